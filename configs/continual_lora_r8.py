"""LoRA, r = 8, on biomedical (or financial) text: three epochs, 65,536 tokens a step; see continual.py. Rates searched: {3, 4}e-4.

LLaMA-2 7B: 20.0 M of 6.7 B parameters train. Table 1: BioMed 52.3, Finance 64.0.
"""
from configs.continual import *

method = "lora"
rank = 8
alpha = 16
train_rest = False
base_dtype = "bfloat16"
lr = 4e-4
