"""Shared by the 60M configs: GaLore's 60M shape, 512 / 1376 / 8 layers / 8 heads, on Wikipedia.

    python data.py text wiki wiki-train.*.json.gz --val wiki-validation.*.json.gz

The vocabulary is GPT-2's: 77 M parameters, 51 M of them in the embeddings and the head. data/wiki
has 36 M tokens; any other text can be prepared in the same way.
"""
data = "data/wiki"
seq_len = 512
batch_size = 128

hidden_size = 512
intermediate_size = 1376
num_hidden_layers = 8
num_attention_heads = 8
