"""Full-rank training, 1.3B on C4: 10k steps x 1024 x 512 = 5.24 B tokens.

One H200, at FFN 5504: about 64.8k tokens/s, 22.5 hours, 44.5 GiB; results/throughput_h200.

The paper has no full-rank row; lr is the protocol's, not tuned.
"""
from configs.c4_1300m import *

method = "full"
