"""LoRA, r = 128, 1.3B on C4: 10k steps x 1024 x 512 = 5.24 B tokens.

One H200: about 75.7k tokens/s, 19.2 hours, 36.9 GiB, measured with FFN 5504; results/throughput_h200.

Section 5.3; scale alpha / rank = 0.5. Table 3: perplexity 28.56 on C4 (with the paper's 32,100-token vocabulary).
"""
from configs.c4_1300m import *

method = "lora"
rank = 128
alpha = 64
