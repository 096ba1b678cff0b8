"""python train.py configs/copying.py"""
from configs.mqar import *

dataset = "copying"  # selecting among blanks takes longest
max_iters = 1000
