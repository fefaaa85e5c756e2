"""Full-rank training, 1.3B on C4: 10k steps x 1024 x 512 = 5.24 B tokens.

The paper has no full-rank row; lr is the protocol's, not tuned.
"""
from configs.c4_1300m import *

method = "full"
