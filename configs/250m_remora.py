"""ReMoRA, r = 128, 250M on C4: 10k steps x 1024 x 512 = 5.24 B tokens.

One H200: about 277k tokens/s, 5.3 hours, 18.6 GiB with permuted groups, and 292k tokens/s,
5.0 hours, 21.2 GiB with strided groups; results/throughput_h200.

MoRA that is merged and restarted every 2,000 steps, with strided and contiguous groups in turn;
each restart warms up over 50 steps. groups = "permute" removes the limit on the rank of the sum.
Table 3: perplexity 26.74 on C4, with the paper's vocabulary of 32,100 tokens.
"""
from configs.c4_250m import *

method = "mora"
rank = 128
groups = "alternate"
restart_every = 2000
