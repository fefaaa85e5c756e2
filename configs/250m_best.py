"""configs/60m_best.py at 250M, r = 128, on C4: 10k steps x 1024 x 512 = 5.24 B tokens.

At 60M it has the lowest perplexity per token of the adapters with 10 % of the block parameters.
With 25 %, as here, it is level with LoRA. Its rates are 60M's and have run here for 200 steps only,
where a quarter of its rest_lr is better. On Wikipedia, 131 M tokens in 3.7 passes, one seed, it ran
at 4e-3 and 8e-3 and at half its rates, 2e-3 and 1.6e-2. After 66 M tokens it is 3.9 % and 2.4 %
ahead of LoRA at the same rates. The lowest perplexities differ by 0.4 and 1.1 %: 31.46 and LoRA's
31.33 at the former, 31.05 and 30.72 at the latter, where it ends at 32.18 and LoRA at its lowest.
See results/pretrain_250m.
"""
from configs.c4_250m import *

method, rank, lora_rank = "mora", 128, 64
groups, restart_every, restart_warmup = "permute", 10, 0
optimizer, lr, rest_lr, residual_init = "muon", 4e-3, 3.2e-2, True
