"""UUID pairs (section 5.1): 10,000 pairs; given the first UUID, write the second.

    python data.py uuid --tokenizer=PATH
    torchrun train.py configs/uuid.py mora_r8 --init_from=PATH
    python evaluate.py out/uuid_mora_r8 data/uuid --answers

100 epochs x 10,000 / 1,000 = 1,000 steps. A pair has about 70 tokens: 70 M tokens in all, 174-230 s
on one H200 with a model of 135 M parameters (results/uuid; the rates of that model stand there).
PATH is the base model, any directory of the LLaMA architecture; the paper's is LLaMA-2 7B.
The table gives the paper's character accuracy in % at steps 300, 500, 700 and 900 (Table 2) and
the rates that the paper searched; each variant takes the highest of them. Chance is 6.25 %; a
model that has learned only the form of a UUID reaches 9.8 %.
The paper names rates but no schedule, so the rate is constant.
"""
data = "data/uuid"
init_from = "models/base"
seq_len = 128
batch_size = 1000
micro_batch = 125

epochs = 100
warmup = 0
min_lr_ratio = 1.0

log_every = 10
eval_every = 100
save_every = 100

_lora = dict(method="lora", train_rest=False)
_mora = dict(method="mora", operator="share", train_rest=False)
variants = {                                                 # 300   500   700   900   rates
    "fft": dict(method="full", lr=3e-5),                     # 42.5  100   100   100   3e-5
    "lora_r8": dict(_lora, rank=8, alpha=16, lr=3e-4),       # 9.9   10.0  10.7  54.2  {1, 2, 3}e-4
    "mora_r8": dict(_mora, rank=8, lr=2e-4),                 # 10.1  15.7  87.4  100   {.5, 1, 2}e-4
    "lora_r256": dict(_lora, rank=256, alpha=128, lr=3e-4),  # 9.9   70.6  100   100   {1, 2, 3}e-4
    "mora_r256": dict(_mora, rank=256, lr=2e-4),             # 41.6  100   100   100   {.5, 1, 2}e-4
}
