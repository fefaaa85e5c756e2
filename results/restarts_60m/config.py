"""Restarts at the 60M shape: r = 32, five cycles, 1,000 steps x 64 x 512 = 32.8 M tokens of Wikipedia, nearly one epoch of data/wiki.

run.py sets method, groups, restart_every and lr.
"""
data = "data/wiki"
seq_len = 512
batch_size = 64

hidden_size = 512
intermediate_size = 1376
num_hidden_layers = 8
num_attention_heads = 8

rank = 32
restart_warmup = 20

steps = 1000
warmup = 100
log_every = 20
eval_every = 1000
save_every = 1000
keep = 1
