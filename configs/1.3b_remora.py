"""ReMoRA, r = 128, 1.3B on C4: 10k steps x 1024 x 512 = 5.24 B tokens.

One H200, at FFN 5504: about 78.5k tokens/s, 18.6 hours, 29.9 GiB with permuted groups, and
81.7k tokens/s, 17.8 hours, 31.8 GiB with strided groups; results/throughput_h200.

MoRA that is merged and restarted every 2,000 steps, with strided and contiguous groups in turn;
each restart warms up over 50 steps. groups = "permute" removes the limit on the rank of the sum.
Table 3: perplexity 23.34 on C4, with the paper's vocabulary of 32,100 tokens.
"""
from configs.c4_1300m import *

method = "mora"
rank = 128
groups = "alternate"
restart_every = 2000
