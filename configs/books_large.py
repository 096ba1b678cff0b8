"""Victorian books, the largest of three sizes: 2.7M parameters, and one epoch.

    python train.py configs/books_large.py --mixer=gated_deltanet

2.7M parameters (and 0.8M in the vocabulary). 20 tokens for each would be 53M, more than the
training authors have: this reads 36M, 14 for each. The rate is that of books_medium.py by the
rule that was seen there, over the width. Not run by us yet.
"""
from configs.books import *

n_layer = 6
n_head = 6
n_embd = 192       # 32 channels a head
max_iters = 8800
warmup_iters = 440
learning_rate = 10e-3
eval_interval = 1760
log_interval = 176
