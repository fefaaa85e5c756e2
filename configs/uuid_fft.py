"""Full fine-tuning, on 10,000 pairs of UUIDs: 1,000 steps x 1,000 pairs; see uuid.py. Rates searched: 3e-5.

Table 2 (LLaMA-2 7B): character accuracy 42.5, 100, 100, 100 % at steps 300, 500, 700, 900.
"""
from configs.uuid import *

method = "full"
lr = 3e-5
