"""The adapter with the lowest perplexity per token at 60M, r = 32: 2,000 x 64 x 512 = 66 M tokens.

    torchrun train.py configs/60m_best.py

Half of the rank is a MoRA with permuted groups that restarts every ten steps, the other half is a
LoRA that no restart touches. Muon trains the matrices; embeddings, head and norms have a learning
rate of their own. results/pretrain_60m compares it with others, three seeds; in the same GPU time
ReMoRA with permuted groups alone is 2 % ahead of it.
"""
from configs.wiki_60m import *

batch_size = 64

method = "mora"
rank = 32
lora_rank = 16
groups = "permute"
restart_every = 10
restart_warmup = 0

optimizer = "muon"
lr = 4e-3
rest_lr = 3.2e-2
residual_init = True

steps = 2000
warmup = 100
eval_every = 500
save_every = 1000
