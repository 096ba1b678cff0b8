"""Induction heads in the size of Gu and Dao 2023 (see data/induction_paper). For a GPU; not run.

python train.py configs/induction_paper.py --mixer=causal_mean,lln
"""
from configs.mqar_paper import *

dataset = "induction_paper"
n_embd = 64
batch_size = 64    # 64 x 256 = 16,384 tokens a step
max_iters = 20000
learning_rate = 1e-3
eval_interval = 1000
