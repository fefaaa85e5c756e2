"""MoRA, r = 256, share, on MetaMath: 9,165 steps x 128 questions; see metamath.py. Rates searched: {3, 5}e-5.

LLaMA-2 7B: 639 M of 6.7 B parameters train. Table 1: GSM8K 67.9, MATH 19.2.
"""
from configs.metamath import *

method = "mora"
rank = 256
operator = "share"
train_rest = False
base_dtype = "bfloat16"
lr = 5e-5
