"""python train.py configs/copying.py"""
from configs.mqar import *

dataset = "copying"
batch_size = 64        # 64 x 64 = 4,096 tokens a step: selecting among blanks is learned slowly, so more steps of half the size
max_iters = 1600
learning_rate = 4e-3   # softmax reached 0.93 with 2e-3 and 0.97 with this
