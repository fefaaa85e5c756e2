"""Speed of `python data.py text` against tiktoken's own encode_ordinary_batch, same documents, start-up left out on both sides.

    python results/first_run/prepare_speed.py TRAIN_FILES...         -> results/first_run/prepare.json

Prepares the corpus three times (start-up of datasets paid before), encodes the documents three times in between, takes medians.
"""
import json
import os
import shutil
import statistics
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))
import data
import tokenizer

files = [Path(name) for name in sys.argv[1:]]
encoding = tokenizer.load("gpt2").encoding
documents = [text for texts in data.file_texts(files, "text") for text in texts]
size = sum(len(text.encode()) for text in documents) / 1e6
ours, theirs = [], []
for _ in range(3):
    shutil.rmtree("data/speed", ignore_errors=True)
    ours.append(data.prepare_files("speed", files, [], "text", "gpt2")["mb_per_s"])
    start = time.time()
    encoding.encode_ordinary_batch(documents, num_threads=os.cpu_count())
    theirs.append(size / (time.time() - start))
shutil.rmtree("data/speed")
Path(__file__).with_name("prepare.json").write_text(json.dumps({"cores": os.cpu_count(), "mb": size, "prepare_mb_per_s": statistics.median(ours), "tiktoken_mb_per_s": statistics.median(theirs),
           "prepare_over_tiktoken": statistics.median(ours) / statistics.median(theirs), "all_prepare": ours, "all_tiktoken": theirs}, indent=1))
