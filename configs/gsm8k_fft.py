"""Full fine-tuning, on GSM8K: 174 steps x 128 questions; see gsm8k.py. With 135 M parameters 7.3 % exact match."""
from configs.gsm8k import *

method = "full"
lr = 3e-4
