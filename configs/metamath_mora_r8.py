"""MoRA, r = 8, rotate, on MetaMath: 9,165 steps x 128 questions; see metamath.py. Rates searched: {2, 3}e-4.

LLaMA-2 7B: 19.9 M of 6.7 B parameters train. Table 1: GSM8K 64.2, MATH 15.4.
"""
from configs.metamath import *

method = "mora"
rank = 8
operator = "rotate"
train_rest = False
base_dtype = "bfloat16"
lr = 3e-4
