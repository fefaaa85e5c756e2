"""configs/60m_best.py at 250M, r = 128, on C4: 10k steps x 1024 x 512 = 5.24 B tokens.

It has the lowest perplexity per token at 60M so far. Its learning rates are 60M's. On short runs of
13 M tokens at this shape a quarter of its rest_lr is better; see results/pretrain_250m.
"""
from configs.c4_250m import *

method, rank, lora_rank = "mora", 128, 64
groups, restart_every, restart_warmup = "permute", 10, 0
optimizer, lr, rest_lr, residual_init = "muon", 4e-3, 3.2e-2, True
