"""ReMoRA, r = 128, 250M on C4: 10k steps x 1024 x 512 = 5.24 B tokens.

One H200: about 279k tokens/s, 5.2 hours, 21.1 GiB (measured without restarts and with strided groups); results/throughput_first_look.

MoRA, merged and started again every 2,000 steps, strided and contiguous groups in turn. Table 3: perplexity 26.74 on C4 (with the
paper's 32,100-token vocabulary). groups = "permute" lifts the cap on the rank.
"""
from configs.c4_250m import *

method = "mora"
rank = 128
groups = "alternate"
restart_every = 2000
restart_warmup = 50
