"""Induction heads on a laptop: what followed the trigger before.

    python train.py configs/induction.py --mixer=lln

Expect an accuracy of 1.00 on the test split for softmax and lln, 0.08 for causal_max.
"""
from configs.mqar import *

optimizer = "adamw"    # as its records were made
learning_rate = 2e-3
dataset = "induction"
max_iters = 700
