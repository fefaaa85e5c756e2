"""What the five continual pretraining runs share (appendix A): batch 128, linear, warm-up 150, three epochs.

Text, not samples: `python data.py text biomed FILES... --val FILES... --tokenizer=PATH`. A step is 128 x 512 = 65,536 tokens; at less than 3.3 M
tokens of text three epochs are over before the warm-up is: take a smaller --warmup then. Finance: --data=data/finance --out=out/finance_mora_r8.
Base model: --init_from=PATH (the paper's is LLaMA-2 7B). On one H200, by arithmetic and not measured: full fine-tuning of 7B keeps 16 bytes a
parameter, 108 GB; adapters on a bfloat16 base 14 GB and the activations.
Of the rates that the paper searched each file takes the highest.
"""
data = "data/biomed"
init_from = "models/base"
seq_len = 512
batch_size = 128
micro_batch = 16

epochs = 3
schedule = "linear"
warmup = 150
min_lr_ratio = 0.0

eval_every = 100
save_every = 100
