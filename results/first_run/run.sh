#!/usr/bin/env bash
# The newcomer's day on one GPU: train, be killed, resume, merge, evaluate, and let transformers judge.
# Needs data/wiki and data/c4_sample (gpt2 tokens). usage: bash results/first_run/run.sh OUT
set -euo pipefail
out=$1; run=$(mktemp -d)/60m_mora
python3 train.py configs/60m_mora.py --out="$run" > "$out/train.txt" 2>&1 & pid=$!
until [ -d "$run/step-00000200" ]; do kill -0 $pid || { cat "$out/train.txt"; exit 1; }; sleep 0.2; done
sleep 3; kill -9 $pid; wait $pid || true
echo "--- killed; resumed ---" >> "$out/train.txt"
python3 train.py configs/60m_mora.py --out="$run" --resume >> "$out/train.txt" 2>&1
python3 merge.py "$run" | tee "$out/merge.txt"
for data in wiki c4_sample; do python3 evaluate.py "$run" data/$data; python3 evaluate.py "$run/merged" data/$data; done | tee "$out/evaluate.jsonl"
python3 results/first_run/transformers_ppl.py "$run/merged" data/wiki | tee "$out/transformers.json"
python3 sample.py "$run/merged" --prompt="The city of" --max_new_tokens=80 | tee "$out/sample.txt"
cp "$run/log.jsonl" "$run/config.json" "$out/"
cat "$out/train.txt"; nvidia-smi --query-gpu=name,driver_version --format=csv
