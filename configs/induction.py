"""python train.py configs/induction.py"""
from configs.mqar import *

dataset = "induction"
max_iters = 700
