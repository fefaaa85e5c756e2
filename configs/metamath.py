"""What the five MetaMath runs share (appendix A, mathematics): batch 128, cosine, warm-up 300, three epochs.

395 k questions, every 100th for validation: 3 x 391 k / 128 = 9,165 steps. Data: `python data.py metamath --tokenizer=PATH --seq_len=512`.
Score on GSM8K's test questions, prepared by `python data.py sft gsm8k ...`: `python evaluate.py out/metamath_mora_r8 data/gsm8k --answers
--max_new_tokens=512`.
Base model: --init_from=PATH (the paper's is LLaMA-2 7B). On one H200, by arithmetic and not measured: full fine-tuning of 7B keeps 16 bytes a
parameter, 108 GB; adapters on a bfloat16 base 14 GB and the activations.
Of the rates that the paper searched each file takes the highest.
"""
data = "data/metamath"
init_from = "models/base"
seq_len = 512
batch_size = 128
micro_batch = 16

epochs = 3
warmup = 300
min_lr_ratio = 0.0

eval_every = 500
save_every = 500
