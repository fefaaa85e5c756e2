"""What the five Tulu v2 runs share (appendix A, instructions): batch 128, cosine, warm-up 500, two epochs.

326 k chats, every 100th for validation: 2 x 323 k / 128 = 5,043 steps. Data: `python data.py tulu --tokenizer=PATH --seq_len=2048`, longer chats
are dropped and counted.
Base model: --init_from=PATH (the paper's is LLaMA-2 7B). On one H200, by arithmetic and not measured: full fine-tuning of 7B keeps 16 bytes a
parameter, 108 GB; adapters on a bfloat16 base 14 GB and the activations.
Of the rates that the paper searched each file takes the highest.
"""
data = "data/tulu"
init_from = "models/base"
seq_len = 2048
batch_size = 128
micro_batch = 4

epochs = 2
warmup = 500
min_lr_ratio = 0.0

eval_every = 500
save_every = 500
