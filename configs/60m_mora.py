"""MoRA, r = 32, 60M on Wikipedia: 400 steps x 128 x 512 = 26 M tokens.

    python data.py text wiki wiki-train.*.json.gz --val wiki-validation.*.json.gz
    torchrun train.py configs/60m_mora.py

The shape is GaLore's 60M (512 / 1376 / 8 layers / 8 heads), the vocabulary is GPT-2's: 77 M
parameters, 51 M of them in the embeddings and the head. data/wiki has 36 M tokens; any other text
can be prepared in the same way.
"""
data = "data/wiki"
seq_len = 512
batch_size = 128

hidden_size = 512
intermediate_size = 1376
num_hidden_layers = 8
num_attention_heads = 8

method = "mora"
rank = 32

steps = 400
lr = 2e-3
warmup = 50
eval_every = 100
save_every = 200
