"""Passkey on a laptop: five digits hidden in filler.

    python train.py configs/passkey.py --mixer=lln

Expect an accuracy of 0.99 on the test split for softmax and lln, 0.10 (chance) for causal_max.
"""
from configs.mqar import *

optimizer = "adamw"    # as its records were made
learning_rate = 2e-3
dataset = "passkey"
block_size = 128
batch_size = 64
max_iters = 600
