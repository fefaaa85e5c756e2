# Everything in this folder, on a machine of two H200s: each shape on one GPU, then both GPUs together. About seven minutes.
#   bash results/throughput_h200/run.sh FOLDER
OUT=$1
here=results/throughput_h200
nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv > $OUT/machine.txt
(
    export CUDA_VISIBLE_DEVICES=0
    python3 bench.py --shape=1.3b --repeats=3 --json=$OUT/a.json
    python3 bench.py --shape=1.3b --repeats=3 --batch=16 --quick --methods=full,mora --json=$OUT/b.json
    python3 bench.py --shape=7b --repeats=3 --steps=5 --quick --methods=mora,lora --json=$OUT/a.json
) > $OUT/bench_0.txt 2>&1 &
(
    export CUDA_VISIBLE_DEVICES=1
    python3 bench.py --shape=250m --repeats=3 --json=$OUT/c.json
    python3 $here/measure.py $OUT/measure.json
    python3 $here/measure.py profile 1.3b:mora 1.3b:full 250m:mora 250m:full > $OUT/profile.txt 2>&1
) > $OUT/bench_1.txt 2>&1 &
wait
(
    python3 bench.py --shape=1.3b --processes=2 --repeats=3 --quick --methods=full,mora --json=$OUT/d.json
    python3 bench.py --shape=250m --processes=2 --repeats=3 --quick --methods=full,mora --json=$OUT/d.json
) > $OUT/bench_2.txt 2>&1
python3 - $OUT <<'END'
import json, sys
out = sys.argv[1]
numbers = {}
for name in "acd":
    numbers |= json.load(open(f"{out}/{name}.json"))
numbers |= {f"sequences_16.{key}": value for key, value in json.load(open(f"{out}/b.json")).items()}
json.dump(numbers, open(f"{out}/bench.json", "w"), indent=1)
END
