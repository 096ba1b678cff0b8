"""python train.py configs/passkey.py"""
from configs.mqar import *

dataset = "passkey"
block_size = 128
batch_size = 64
max_iters = 600
