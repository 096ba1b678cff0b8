"""python train.py configs/parity.py"""
from configs.mqar import *

dataset = "parity"
block_size = 32
batch_size = 128
pos = "rope"
