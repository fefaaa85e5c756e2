"""MoRA, r = 8, rotate, on Tulu v2: 5,043 steps x 128 chats; see tulu.py. Rates searched: {2, 3}e-4.

LLaMA-2 7B: 19.9 M of 6.7 B parameters train. Table 1: MMLU 49.7 0-shot, 51.5 5-shot.
"""
from configs.tulu import *

method = "mora"
rank = 8
operator = "rotate"
train_rest = False
base_dtype = "bfloat16"
lr = 3e-4
