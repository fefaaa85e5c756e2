"""Full fine-tuning, on GSM8K: 174 steps x 128 questions; see gsm8k.py. Rate: MetaMath's."""
from configs.gsm8k import *

method = "full"
lr = 2e-5
