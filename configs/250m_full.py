"""Full-rank training, 250M on C4: 10k steps x 1024 x 512 = 5.24 B tokens.

One H200: about 277k tokens/s, 5.3 hours, 25.5 GiB; results/throughput_h200.

The paper has no full-rank row; lr is the protocol's, not tuned.
"""
from configs.c4_250m import *

method = "full"
