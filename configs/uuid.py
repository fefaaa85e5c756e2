"""What the five UUID runs share (section 5.1): 10,000 pairs of random UUIDs; given the first, write the second.

1,000 steps x 1,000 pairs = 100 epochs; a pair is about 70 tokens: 70 M tokens. With a model of 135 M parameters 180-230 s on one H200
(results/uuid). Base model: --init_from=PATH, a directory of the LLaMA architecture (the paper's is LLaMA-2 7B); data:
`python data.py uuid --tokenizer=PATH`; score: `python evaluate.py out/uuid_mora_r8 data/uuid --answers`.

Character accuracy: chance is 6.25 %, knowing the form alone gives 9.8 %. The paper names rates and no schedule, so the rate is constant;
of the rates that it searched each file takes the highest; what a model of 135 M parameters took stands in results/uuid.
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
