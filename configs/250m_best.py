"""configs/60m_best.py at 250M, r = 128, on C4: 10k steps x 1024 x 512 = 5.24 B tokens.

At 60M it has the lowest perplexity per token of the adapters with 10 % of the block parameters.
With 25 %, as here, it is level with LoRA. Its rates are 60M's. On runs of 200 steps here a quarter
of its rest_lr is better. When both run at 4e-3 and 8e-3, it is 4 % ahead of LoRA after 66 M tokens
of Wikipedia and level after 131 M, 3.7 passes, one seed. After 131 M LoRA at 2e-3 and 1.6e-2 is 2 %
ahead of both. The pair has run that long neither at those rates nor at the ones below. See
results/pretrain_250m.
"""
from configs.c4_250m import *

method, rank, lora_rank = "mora", 128, 64
groups, restart_every, restart_warmup = "permute", 10, 0
optimizer, lr, rest_lr, residual_init = "muon", 4e-3, 3.2e-2, True
