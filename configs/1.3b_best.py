"""configs/60m_best.py at 1.3B, r = 128, on C4: 10k steps x 1024 x 512 = 5.24 B tokens.

At 60M it has the lowest perplexity per token of the adapters with 10 % of the block parameters, as
here. Its rates are 60M's; they have not been checked here, and on runs of 200 steps at 250M a lower
rest_lr is better. FP8 needs --intermediate_size=5504, a multiple of 16.
"""
from configs.c4_1300m import *

method, rank, lora_rank = "mora", 128, 64
groups, restart_every, restart_warmup = "permute", 10, 0
optimizer, lr, rest_lr, residual_init = "muon", 4e-3, 3.2e-2, True
