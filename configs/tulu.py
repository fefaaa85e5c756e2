"""Tulu v2 (appendix A, instructions): 326k chats, two epochs.

    python data.py tulu --tokenizer=PATH --seq_len=2048
    torchrun train.py configs/tulu.py mora_r8 --init_from=PATH

Every 100th chat is kept for validation: 2 epochs x 323k / 128, about 5,040 steps. Chats longer
than --seq_len are dropped and counted.
PATH is the base model; the paper's is LLaMA-2 7B (its memory on one H200: see metamath.py).
The table gives the trained parameters of LLaMA-2 7B, the paper's scores on MMLU, 0-shot and
5-shot (Table 1), and the rates that the paper searched; each variant takes the highest of them.
"""
data = "data/tulu"
epochs = 2
seq_len = 2048
batch_size = 128
micro_batch = 4
init_from = "models/base"

warmup = 500
min_lr_ratio = 0.0
eval_every = 500
save_every = 500

_adapters = dict(train_rest=False, base_dtype="bfloat16")
_lora = dict(_adapters, method="lora")
_mora = dict(_adapters, method="mora")
variants = {                                                        # trained  0-sh  5-sh  rates
    "fft": dict(method="full", lr=2e-5),                            # 6.7 B    50.6  51.3  2e-5
    "lora_r8": dict(_lora, rank=8, alpha=16, lr=2e-4),              # 20.0 M   50.2  51.5  {1, 2}e-4
    "mora_r8": dict(_mora, rank=8, operator="rotate", lr=3e-4),     # 19.9 M   49.7  51.5  {2, 3}e-4
    "lora_r256": dict(_lora, rank=256, alpha=128, lr=2e-4),         # 640 M    49.7  50.8  {1, 2}e-4
    "mora_r256": dict(_mora, rank=256, operator="share", lr=5e-5),  # 639 M    49.9  51.4  {3, 5}e-5
}
