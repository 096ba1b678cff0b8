"""Selective copying in the size of MAD's (see data/copying_paper). For a GPU; not run by us.

python train.py configs/copying_paper.py --mixer=lln
"""
from configs.mqar_paper import *

dataset = "copying_paper"
mixer = "softmax"
n_layer = 2        # MAD's two mixers and two FFNs
pos = "learned"    # rows of one length
batch_size = 128   # 128 x 256 = 32,768 tokens a step
max_iters = 20000  # 200 times the 12,800 rows
learning_rate = 5e-4    # theirs: the best of 1e-4, 5e-4 and 1e-3
eval_interval = 1000
