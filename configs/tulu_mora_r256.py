"""MoRA, r = 256, share, on Tulu v2: 5,043 steps x 128 chats; see tulu.py. Rates searched: {3, 5}e-5.

LLaMA-2 7B: 639 M of 6.7 B parameters train. Table 1: MMLU 49.9 0-shot, 51.4 5-shot.
"""
from configs.tulu import *

method = "mora"
rank = 256
operator = "share"
train_rest = False
base_dtype = "bfloat16"
lr = 5e-5
