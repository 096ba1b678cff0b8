"""nanoGPT's "baby GPT" on tiny Shakespeare, by characters: 10.6M parameters.

    python train.py configs/shakespeare_baby.py

Minutes on a GPU, hours on a laptop.
"""
dataset = "shakespeare_char"
n_layer = 6
n_head = 6
n_embd = 384       # 64 channels a head
block_size = 256
init_std = 0.02    # GPT-2's, as published
batch_size = 64    # 64 x 256 = 16,384 tokens a step
max_iters = 5000   # 82M tokens, 82 times the training split: hence the dropout
learning_rate = 1e-3   # to 1e-4 by cosine
warmup_iters = 100
beta2 = 0.99
weight_decay = 0.1
grad_clip = 1.0
dropout = 0.2
bias = False
eval_interval = 250
log_interval = 10
