"""ReMoRA, r = 128, 250M on C4: 10k steps x 1024 x 512 = 5.24 B tokens.

One H200: about 277k to 292k tokens/s, 5.0 to 5.3 hours, 18.6 to 21.2 GiB (permuted to strided groups); results/throughput_h200.

MoRA, merged and started again every 2,000 steps, strided and contiguous groups in turn. Table 3: perplexity 26.74 on C4 (with the
paper's 32,100-token vocabulary). groups = "permute" lifts the cap on the rank.
"""
from configs.c4_250m import *

method = "mora"
rank = 128
groups = "alternate"
restart_every = 2000
restart_warmup = 50
