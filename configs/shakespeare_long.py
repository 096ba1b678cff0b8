"""Four times the context of configs/shakespeare.py, 3.3 times the parameters (2.7M), as many tokens: six minutes on a laptop's core.

python -m tools.sweep configs/shakespeare_long.py --mixers=softmax,lln --learning_rates=1e-3,3e-3 --seeds=3
"""
dataset = "shakespeare_char"
n_layer = 6
n_head = 6
n_embd = 192       # 32 channels a head
block_size = 256
batch_size = 8     # 8 x 256 = 2,048 tokens a step
max_iters = 800    # 1.6M tokens, 1.6 times the training split: no need of dropout
learning_rate = 1e-3   # to 1e-4 by cosine
warmup_iters = 100
beta2 = 0.99
weight_decay = 0.1
grad_clip = 1.0
dropout = 0.0
bias = False
eval_interval = 400
log_interval = 50
