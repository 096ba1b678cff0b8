"""Multi-query associative recall in the size that zoology now uses (see data/mqar_paper).

For a GPU; not run by us.

python train.py configs/mqar_paper.py --mixer=causal_mean,lln

There the first layer of every model is a short convolution; here it is causal_mean, which sees a
token and the one before, and the mixer in question is the second. Neither has positions, so that
rows four times as long can be tested.
"""
dataset = "mqar_paper"
mixer = "causal_mean,softmax"
n_layer = 2
n_head = 2
n_embd = 128       # theirs: 64 to 256, by the size of the state
pos = "none"
init_std = 0.1
block_size = 256   # the longest row to train on
batch_size = 256   # 256 x 256 = 65,536 tokens a step, padding included
max_iters = 22500  # 32 times the 180,000 rows
learning_rate = 3.2e-3  # theirs: the best of 1e-3, 3.2e-3, 1e-2 and 3.2e-2
warmup_iters = 500
beta2 = 0.999
weight_decay = 0.1
bias = False
eval_interval = 700     # about once through the rows
eval_tokens = 2**23     # all of them, in each split
