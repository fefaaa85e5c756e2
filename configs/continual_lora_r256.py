"""LoRA, r = 256, on biomedical (or financial) text: three epochs, 65,536 tokens a step; see continual.py. Rates searched: {3, 4}e-4.

LLaMA-2 7B: 640 M of 6.7 B parameters train. Table 1: BioMed 54.1, Finance 67.3.
"""
from configs.continual import *

method = "lora"
rank = 256
alpha = 128
train_rest = False
base_dtype = "bfloat16"
lr = 4e-4
