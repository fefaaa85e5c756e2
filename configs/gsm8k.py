"""GSM8K, for small models and short runs: 7,473 questions, three epochs.

    python data.py sft gsm8k train.jsonl --val test.jsonl --tokenizer=PATH --seq_len=576
    torchrun train.py configs/gsm8k.py mora_r8 --init_from=PATH
    python evaluate.py out/gsm8k_mora_r8 data/gsm8k --answers

3 epochs x 58 whole batches of 128 = 174 steps of about 28,000 tokens: 4.9 M tokens.
A model of 135 M parameters trains in 18-27 s on one H200 that a second run shares, and answers
the test questions in 12-20 s (results/gsm8k: 7,000 questions, micro_batch 128).
The paper has no such run. The protocol is MetaMath's (appendix A) with a shorter warm-up: the
paper's 300 steps are more than the whole run. Each rate was the best for the 135M model; the
score is its exact match on the test questions, a mean of three seeds. For 7B models start from
rates 15 to 50 times smaller, as in metamath.py.
"""
data = "data/gsm8k"
init_from = "models/base"
seq_len = 576
batch_size = 128
micro_batch = 16

epochs = 3
warmup = 20
min_lr_ratio = 0.0

eval_every = 58
save_every = 58

variants = {                                                                                 # score
    "fft": dict(method="full", lr=3e-4),                                                     # 7.4 %
    "lora_r8": dict(method="lora", rank=8, alpha=16, train_rest=False, lr=1e-2),             # 6.9 %
    "mora_r8": dict(method="mora", rank=8, operator="rotate", train_rest=False, lr=5.5e-3),  # 6.9 %
}
