"""MoRA, r = 32, 60M on Wikipedia: 400 steps x 128 x 512 = 26 M tokens.

    torchrun train.py configs/60m_mora.py
"""
from configs.wiki_60m import *

method = "mora"
rank = 32

steps = 400
lr = 2e-3
warmup = 50
eval_every = 100
save_every = 200
