"""MoRA, r = 32, on a 60M shape (GaLore's: 512 / 1376 / 8 layers / 8 heads) and Wikipedia text, with GPT-2's vocabulary.

400 steps x 128 sequences x 512 tokens = 26 M tokens of the 36 M in data/wiki. 77 M parameters, 51 M of them in the embeddings and
the head. Prepare the data with `python data.py text wiki wiki-train.*.json.gz --val wiki-validation.*.json.gz`, or any text of yours.
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
