"""LoRA, r = 256, on MetaMath: 9,165 steps x 128 questions; see metamath.py. Rates searched: {1, 2}e-4.

LLaMA-2 7B: 640 M of 6.7 B parameters train. Table 1: GSM8K 67.9, MATH 19.9.
"""
from configs.metamath import *

method = "lora"
rank = 256
alpha = 128
train_rest = False
base_dtype = "bfloat16"
lr = 2e-4
