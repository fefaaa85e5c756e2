"""Full fine-tuning, on MetaMath: 9,165 steps x 128 questions; see metamath.py. Rates searched: 2e-5.

LLaMA-2 7B: 6.7 B parameters train. Table 1: GSM8K 66.6, MATH 20.1.
"""
from configs.metamath import *

method = "full"
lr = 2e-5
