"""Continual pretraining (appendix A) on biomedical or financial text: three epochs.

    python data.py text biomed FILES... --val FILES... --tokenizer=PATH
    torchrun train.py configs/continual.py mora_r8 --init_from=PATH
    torchrun train.py configs/continual.py mora_r8 --init_from=PATH \\
        --data=data/finance --out=out/finance_mora_r8

One step reads 128 x 512 = 65,536 tokens. With less than 3.3 M tokens of text, three epochs end
within the warm-up of 150 steps: choose a smaller --warmup then.
PATH is the base model; the paper's is LLaMA-2 7B (its memory on one H200: see metamath.py).
The table gives the trained parameters of LLaMA-2 7B, the paper's scores on BioMed and Finance
(Table 1) and the rates that the paper searched; each variant takes the highest of them.
"""
data = "data/biomed"
init_from = "models/base"
batch_size = 128
micro_batch = 16
seq_len = 512

schedule = "linear"
epochs = 3
warmup = 150
min_lr_ratio = 0.0

eval_every = 100
save_every = 100

_adapters = dict(train_rest=False, base_dtype="bfloat16")
_lora = dict(_adapters, method="lora")
_mora = dict(_adapters, method="mora")
variants = {                                                        # trained  Bio   Fin   rates
    "fft": dict(method="full", lr=3e-5),                            # 6.7 B    56.4  69.6  3e-5
    "lora_r8": dict(_lora, rank=8, alpha=16, lr=4e-4),              # 20.0 M   52.3  64.0  {3, 4}e-4
    "mora_r8": dict(_mora, rank=8, operator="rotate", lr=5e-4),     # 19.9 M   53.3  67.1  {4, 5}e-4
    "lora_r256": dict(_lora, rank=256, alpha=128, lr=4e-4),         # 640 M    54.1  67.3  {3, 4}e-4
    "mora_r256": dict(_mora, rank=256, operator="share", lr=7e-5),  # 639 M    55.4  68.7  {5, 7}e-5
}
