"""LoRA, r = 8, on GSM8K: 174 steps x 128 questions; see gsm8k.py. With 135 M parameters 6.9 % exact match."""
from configs.gsm8k import *

method = "lora"
rank = 8
alpha = 16
train_rest = False
lr = 1e-2
