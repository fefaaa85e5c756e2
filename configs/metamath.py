"""MetaMath (appendix A, mathematics): 395k questions, three epochs.

    python data.py metamath --tokenizer=PATH --seq_len=512
    torchrun train.py configs/metamath.py mora_r8 --init_from=PATH
    python data.py sft gsm8k train.jsonl --val test.jsonl --tokenizer=PATH --seq_len=576
    python evaluate.py out/metamath_mora_r8 data/gsm8k --answers --max_new_tokens=512

Every 100th question is kept for validation: 3 epochs x 391k / 128 = 9,165 steps.
PATH is the base model; the paper's is LLaMA-2 7B. Memory of 7B on one H200, by arithmetic and not
measured: full fine-tuning needs 16 bytes per parameter, 108 GB; adapters on a bfloat16 base need
14 GB plus activations.
The table gives the trained parameters of LLaMA-2 7B, the paper's scores on GSM8K and MATH
(Table 1; the operators: Table 4, GSM8K alone) and the rates that the paper searched; each variant
takes the highest of them.
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

_adapters = dict(train_rest=False, base_dtype="bfloat16")
_lora = dict(_adapters, method="lora")
_mora_r8 = dict(_adapters, method="mora", rank=8, lr=3e-4)
_mora_r256 = dict(_adapters, method="mora", rank=256, lr=5e-5)
variants = {                                                 # trained  GSM8K  MATH  rates
    "fft": dict(method="full", lr=2e-5),                     # 6.7 B    66.6   20.1  2e-5
    "lora_r8": dict(_lora, rank=8, alpha=16, lr=2e-4),       # 20.0 M   64.6   15.1  {1, 2}e-4
    "truncate_r8": dict(_mora_r8, operator="truncate"),      # 19.9 M   59.5   -     {2, 3}e-4
    "share_r8": dict(_mora_r8, operator="share"),            # 19.9 M   62.5   -     {2, 3}e-4
    "decouple_r8": dict(_mora_r8, operator="decouple"),      # 19.9 M   63.6   -     {2, 3}e-4
    "mora_r8": dict(_mora_r8, operator="rotate"),            # 19.9 M   64.2   15.4  {2, 3}e-4
    "lora_r256": dict(_lora, rank=256, alpha=128, lr=2e-4),  # 640 M    67.9   19.9  {1, 2}e-4
    "truncate_r256": dict(_mora_r256, operator="truncate"),  # 639 M    66.6   -     {3, 5}e-5
    "mora_r256": dict(_mora_r256, operator="share"),         # 639 M    67.9   19.2  {3, 5}e-5
    "decouple_r256": dict(_mora_r256, operator="decouple"),  # 639 M    67.8   -     {3, 5}e-5
    "rotate_r256": dict(_mora_r256, operator="rotate"),      # 639 M    67.9   -     {3, 5}e-5
}
