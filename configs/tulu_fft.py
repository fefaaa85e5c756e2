"""Full fine-tuning, on Tulu v2: 5,043 steps x 128 chats; see tulu.py. Rates searched: 2e-5.

LLaMA-2 7B: 6.7 B parameters train. Table 1: MMLU 50.6 0-shot, 51.3 5-shot.
"""
from configs.tulu import *

method = "full"
lr = 2e-5
