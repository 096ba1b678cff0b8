"""Victorian books, the middle one of three sizes: four times the parameters and tokens of books.py.

    python train.py configs/books_medium.py --mixer=gated_deltanet

0.8M parameters (and 0.5M in the vocabulary), 15.7M tokens. Not run by us yet.
"""
from configs.books import *

n_head = 4
n_embd = 128       # 32 channels a head
max_iters = 3840
warmup_iters = 192
eval_interval = 960
log_interval = 96
