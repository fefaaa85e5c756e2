"""MoRA, r = 256, share, on biomedical (or financial) text: three epochs, 65,536 tokens a step; see continual.py. Rates searched: {5, 7}e-5.

LLaMA-2 7B: 639 M of 6.7 B parameters train. Table 1: BioMed 55.4, Finance 68.7.
"""
from configs.continual import *

method = "mora"
rank = 256
operator = "share"
train_rest = False
base_dtype = "bfloat16"
lr = 7e-5
