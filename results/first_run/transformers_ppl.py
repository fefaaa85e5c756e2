"""Perplexity of a Hugging Face directory by transformers, float32, on the windows that evaluate.py takes."""
import json
import math
import sys
from pathlib import Path

import torch
from transformers import LlamaForCausalLM

sys.path.insert(0, str(Path(__file__).parents[2]))
from batches import Tokens, every_token_once

folder, data = sys.argv[1:]
device = "cuda" if torch.cuda.is_available() else "cpu"
model, info = LlamaForCausalLM.from_pretrained(folder, output_loading_info=True)
assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
model.to(device).eval()
nats = count = 0
with torch.no_grad():
    for inputs, targets in every_token_once(Tokens(data, "val"), model.config.max_position_embeddings, 16):
        logits = model(inputs.to(device)).logits
        nats += torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.to(device).flatten(), reduction="sum").item()
        count += int((targets != -100).sum())
json.dump({"ppl": math.exp(nats / count), "tokens": count}, sys.stdout)
