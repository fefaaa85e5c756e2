"""MoRA, r = 128, 250M on C4: 10k steps x 1024 x 512 = 5.24 B tokens.

One H200: about 292k tokens/s, 5.0 hours, 21.2 GiB; results/throughput_h200.

Section 5.3, eq. 6: in each layer, groups of inputs and of outputs share one square matrix.
Table 3: perplexity 28.54 on C4, with the paper's vocabulary of 32,100 tokens.
"""
from configs.c4_250m import *

method = "mora"
rank = 128
