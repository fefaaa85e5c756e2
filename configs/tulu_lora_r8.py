"""LoRA, r = 8, on Tulu v2: 5,043 steps x 128 chats; see tulu.py. Rates searched: {1, 2}e-4.

LLaMA-2 7B: 20.0 M of 6.7 B parameters train. Table 1: MMLU 50.2 0-shot, 51.5 5-shot.
"""
from configs.tulu import *

method = "lora"
rank = 8
alpha = 16
train_rest = False
base_dtype = "bfloat16"
lr = 2e-4
