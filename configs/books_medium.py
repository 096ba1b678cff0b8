"""Victorian books, the middle one of three sizes: four times the parameters and tokens of books.py.

    python train.py configs/books_medium.py --mixer=gated_deltanet

0.8M parameters (and 0.5M in the vocabulary), 15.7M tokens. The rate is half of what was best for
softmax, swa and gated_deltanet at half the width, and was seen to be the best of 8e-3, 16e-3 and
32e-3 for each of them here, over a quarter of the steps (results/books_medium_short).
"""
from configs.books import *

n_head = 4
n_embd = 128       # 32 channels a head
max_iters = 3840
warmup_iters = 192
learning_rate = 16e-3
eval_interval = 960
log_interval = 96
