"""LoRA, r = 8, on MetaMath: 9,165 steps x 128 questions; see metamath.py. Rates searched: {1, 2}e-4.

LLaMA-2 7B: 20.0 M of 6.7 B parameters train. Table 1: GSM8K 64.6, MATH 15.1.
"""
from configs.metamath import *

method = "lora"
rank = 8
alpha = 16
train_rest = False
base_dtype = "bfloat16"
lr = 2e-4
