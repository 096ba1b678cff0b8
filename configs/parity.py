"""python train.py configs/parity.py"""
from configs.mqar import *

dataset = "parity"
block_size = 32    # rows of up to 128 are tested
pos = "rope"       # learned positions would end at 32
max_iters = 1000
