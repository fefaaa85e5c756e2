"""MoRA, r = 8, rotate, on GSM8K: 174 steps x 128 questions; see gsm8k.py. With 135 M parameters 7.6 % exact match."""
from configs.gsm8k import *

method = "mora"
rank = 8
operator = "rotate"
train_rest = False
lr = 1e-2
