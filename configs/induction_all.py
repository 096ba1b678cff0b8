"""Induction of any symbol on a laptop: what followed it before, among up to 48 different ones.

    python train.py configs/induction_all.py --mixer=lln

Expect an accuracy of 1.00 on the test split for softmax after 600 steps; a guess reaches 0.02.
"""
from configs.mqar import *

dataset = "induction_all"
block_size = 56    # the length of the longest row
max_iters = 600
