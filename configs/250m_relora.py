"""ReLoRA, r = 128, 250M on C4: 10k steps x 1024 x 512 = 5.24 B tokens.

One H200: about 273k tokens/s, 5.3 hours, 24.6 GiB, measured without restarts;
results/throughput_h200.

LoRA that is merged and restarted every 2,000 steps; each restart warms up over 50 steps.
Table 3: perplexity 32.19 on C4, with the paper's vocabulary of 32,100 tokens.
"""
from configs.c4_250m import *

method = "lora"
rank = 128
alpha = 64
restart_every = 2000
