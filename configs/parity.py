"""Parity on a laptop: of the bits so far, also in rows four times as long as trained on.

    python train.py configs/parity.py --mixer=deltanet --deltanet_negative

Softmax attention and linear attention do not learn it: expect 0.51 to 0.57 on the test split. A
state that may change its sign with every token does.
"""
from configs.mqar import *

optimizer = "adamw"    # as its records were made
learning_rate = 2e-3
dataset = "parity"
block_size = 32    # rows of up to 128 are tested
pos = "rope"       # learned positions would end at 32
max_iters = 1000
