"""LoRA, r = 128, 1.3B on C4: 10k steps x 1024 x 512 = 5.24 B tokens.

One H200, at FFN 5504: about 75.7k tokens/s, 19.2 hours, 36.9 GiB; results/throughput_h200.

Section 5.3; the scale alpha / rank is 0.5. Table 3: perplexity 28.56 on C4, with the paper's
vocabulary of 32,100 tokens.
"""
from configs.c4_1300m import *

method = "lora"
rank = 128
alpha = 64
