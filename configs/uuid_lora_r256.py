"""LoRA, r = 256, on 10,000 pairs of UUIDs: 1,000 steps x 1,000 pairs; see uuid.py. Rates searched: {1, 2, 3}e-4.

Table 2 (LLaMA-2 7B): character accuracy 9.9, 70.6, 100, 100 % at steps 300, 500, 700, 900.
"""
from configs.uuid import *

method = "lora"
rank = 256
alpha = 128
train_rest = False
lr = 3e-4
