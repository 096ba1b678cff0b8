"""Induction of any symbol on a laptop: what followed it before, among up to 48 different ones.

    python train.py configs/induction_all.py --mixer=lln
"""
from configs.mqar import *

dataset = "induction_all"
block_size = 56    # the length of the longest row
