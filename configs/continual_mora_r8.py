"""MoRA, r = 8, rotate, on biomedical (or financial) text: three epochs, 65,536 tokens a step; see continual.py. Rates searched: {4, 5}e-4.

LLaMA-2 7B: 19.9 M of 6.7 B parameters train. Table 1: BioMed 53.3, Finance 67.1.
"""
from configs.continual import *

method = "mora"
rank = 8
operator = "rotate"
train_rest = False
base_dtype = "bfloat16"
lr = 5e-4
