"""Overwriting on a laptop: the value that a key was last given, of up to 24 writes to 8 keys.

    python train.py configs/overwrite.py --mixer=deltanet

Who finds a value of the key, but not which one came last, is right in 1.00, 0.62 and 0.42 of the
answers, by difficulty: 8, 16 and 24 writes.
"""
from configs.mqar import *

dataset = "overwrite"
block_size = 56    # the length of the longest row
