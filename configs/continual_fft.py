"""Full fine-tuning, on biomedical (or financial) text: three epochs, 65,536 tokens a step; see continual.py. Rates searched: 3e-5.

LLaMA-2 7B: 6.7 B parameters train. Table 1: BioMed 56.4, Finance 69.6.
"""
from configs.continual import *

method = "full"
lr = 3e-5
