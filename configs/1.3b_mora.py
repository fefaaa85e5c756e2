"""MoRA, r = 128, 1.3B on C4: 10k steps x 1024 x 512 = 5.24 B tokens.

One H200, at FFN 5504: about 81.7k tokens/s, 17.8 hours, 31.8 GiB; results/throughput_h200.

Section 5.3, eq. 6: in each layer, groups of inputs and of outputs share one square matrix.
Table 3: perplexity 25.25 on C4, with the paper's vocabulary of 32,100 tokens.
"""
from configs.c4_1300m import *

method = "mora"
rank = 128
