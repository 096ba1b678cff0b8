"""Overwriting on a laptop: the value that a key was last given, of up to 28 writes to 4 keys.

    python train.py configs/overwrite.py --mixer=deltanet
"""
from configs.mqar import *

dataset = "overwrite"
block_size = 60    # the length of the longest row
