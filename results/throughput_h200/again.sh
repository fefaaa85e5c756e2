# After run.sh: what changed since (LoRA's scale, restarts, DDP's buckets), full rank and MoRA beside it. Two H200s, four minutes.
#   bash results/throughput_h200/again.sh FOLDER
OUT=$1
(
    export CUDA_VISIBLE_DEVICES=0
    python3 bench.py --shape=1.3b --repeats=3 --methods=full,mora,lora,remora_permute --json=$OUT/a.json
) > $OUT/bench_0.txt 2>&1 &
(
    export CUDA_VISIBLE_DEVICES=1
    python3 bench.py --shape=250m --repeats=3 --methods=full,mora,lora,remora_permute --json=$OUT/c.json
) > $OUT/bench_1.txt 2>&1 &
wait
(
    python3 bench.py --shape=1.3b --processes=2 --repeats=3 --quick --methods=mora,full --json=$OUT/d.json
    python3 bench.py --shape=250m --processes=2 --repeats=3 --quick --methods=mora,full --json=$OUT/d.json
) > $OUT/bench_2.txt 2>&1
