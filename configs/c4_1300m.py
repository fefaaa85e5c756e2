"""What the five 1.3B configs share: section 5.3's shape and protocol on C4, with GPT-2's vocabulary.

10,000 steps x 1024 sequences x 512 tokens = 5.24 B tokens. 1.4 B parameters with 50,257 tokens in the vocabulary, of which
1.2 B lie in the 168 adapted linear layers. (5461 is the paper's: a multiple of 64, as 5504, runs about 5 % faster.)
"""
from configs.c4_250m import *

micro_batch = 32

hidden_size = 2048
intermediate_size = 5461
num_attention_heads = 32
