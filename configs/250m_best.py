"""configs/60m_best.py at 250M, r = 128, on C4: 10k steps x 1024 x 512 = 5.24 B tokens.

Of the adapters it has the lowest perplexity per token at 60M so far. Its learning rates are 60M's.
On short runs at this shape a quarter of its rest_lr is better, and with that, after 131 M tokens,
it is level with LoRA and takes 1.3 to 1.5 times the time; see results/pretrain_250m.
"""
from configs.c4_250m import *

method, rank, lora_rank = "mora", 128, 64
groups, restart_every, restart_warmup = "permute", 10, 0
optimizer, lr, rest_lr, residual_init = "muon", 4e-3, 3.2e-2, True
