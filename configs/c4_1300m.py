"""Shared by the 1.3B configs: section 5.3's shape and protocol on C4.

10,000 steps x 1024 sequences x 512 tokens = 5.24 B tokens. The vocabulary is GPT-2's, 50,257
tokens: 1.4 B parameters, 1.2 B of them in the 168 adapted linear layers. intermediate_size 5461 is
the paper's; speeds are measured at 5504, a multiple of 64.
"""
from configs.c4_250m import *

micro_batch = 32

hidden_size = 2048
intermediate_size = 5461
num_attention_heads = 32
