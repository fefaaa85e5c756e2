"""Shared by the 250M configs: section 5.3's shape and protocol on C4.

10,000 steps x 1024 sequences x 512 tokens = 5.24 B tokens. The vocabulary is GPT-2's, 50,257
tokens: 275 M parameters, 198 M of them in the 168 adapted linear layers.
"""
data = "data/c4"
seq_len = 512
batch_size = 1024
micro_batch = 64

hidden_size = 768
intermediate_size = 2560
num_hidden_layers = 24
num_attention_heads = 16

steps = 10_000
lr = 5e-4
warmup = 1000

eval_every = 1000
save_every = 500
