"""MoRA, r = 256, share, on 10,000 pairs of UUIDs: 1,000 steps x 1,000 pairs; see uuid.py. Rates searched: {5e-5, 1e-4, 2e-4}.

Table 2 (LLaMA-2 7B): character accuracy 41.6, 100, 100, 100 % at steps 300, 500, 700, 900.
"""
from configs.uuid import *

method = "mora"
rank = 256
train_rest = False
lr = 2e-4
