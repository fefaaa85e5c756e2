"""ReMoRA, r = 128, 1.3B on C4: 10k steps x 1024 x 512 = 5.24 B tokens.

One H200: about 78.5k to 81.7k tokens/s, 17.8 to 18.6 hours, 29.9 to 31.8 GiB (permuted to strided groups), measured with FFN 5504; results/throughput_h200.

MoRA, merged and started again every 2,000 steps, strided and contiguous groups in turn. Table 3: perplexity 23.34 on C4 (with the
paper's 32,100-token vocabulary). groups = "permute" lifts the cap on the rank.
"""
from configs.c4_1300m import *

method = "mora"
rank = 128
groups = "alternate"
restart_every = 2000
restart_warmup = 50
