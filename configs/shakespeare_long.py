"""Longer than configs/shakespeare.py, where a context can pay: 2.7M parameters, 256 characters, an hour on a laptop.

python -m tools.sweep configs/shakespeare_long.py --mixers=softmax,lln --learning_rates=1e-3,2e-3 --seeds=3
"""
dataset = "shakespeare_char"
n_layer = 6
n_head = 6
n_embd = 192       # 32 channels a head
block_size = 256
batch_size = 16    # 16 x 256 = 4,096 tokens a step
max_iters = 1000   # 4.1M tokens, four times the training split: hence some dropout
learning_rate = 1e-3   # to 1e-4 by cosine
warmup_iters = 100
beta2 = 0.99
weight_decay = 0.1
grad_clip = 1.0
dropout = 0.1
bias = False
eval_interval = 250
log_interval = 50
