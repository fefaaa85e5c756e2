"""What the GSM8K runs share: MetaMath's protocol (appendix A) on 7,473 questions of GSM8K itself, for small models and short runs.

3 x 7,473 / 128 = 174 steps of about 28,000 tokens: 4.9 M tokens. With 135 M parameters 18-27 s on one H200 beside a second run, answers to the test set
12-20 s (results/gsm8k, of 7,000 questions and at micro_batch 128). Rates: the best for that model there, the mean of three seeds beside them; a 7B model
takes 15 to 50 times less, see metamath.py.
Base model: --init_from=PATH; data: `python data.py sft gsm8k train.jsonl --val test.jsonl --tokenizer=PATH --seq_len=576`; score: `python
evaluate.py out/gsm8k_mora_r8 data/gsm8k --answers`. The paper has no such run; its warm-up of 300 steps would never end here.
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
