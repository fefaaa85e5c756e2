"""ReMoRA, r = 128, 1.3B on C4: 10k steps x 1024 x 512 = 5.24 B tokens.

One H200: about 79k tokens/s, 18.4 hours, 31.8 GiB, measured with FFN 5504 (measured without restarts and with strided groups); results/throughput_first_look.

MoRA, merged and started again every 2,000 steps, strided and contiguous groups in turn. Table 3: perplexity 23.34 on C4 (with the
paper's 32,100-token vocabulary). groups = "permute" lifts the cap on the rank.
"""
from configs.c4_1300m import *

method = "mora"
rank = 128
groups = "alternate"
restart_every = 2000
restart_warmup = 50
