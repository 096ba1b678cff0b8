"""Multi-query associative recall on a laptop: two layers, 64 channels. The recipe of all recall tasks.

python train.py configs/mqar.py --mixer=lln && python train.py --eval_only --eval_split=test --out_dir=out/mqar_lln
"""
dataset = "mqar"
n_layer = 2        # one to bind a value to its key, one to look it up
n_head = 2
n_embd = 64        # 32 channels a head
block_size = 64    # at least the length of a row
batch_size = 64    # 64 x 64 = 4,096 tokens a step
max_iters = 2000
learning_rate = 3e-3   # to 3e-4 by cosine
warmup_iters = 100
beta2 = 0.99
weight_decay = 0.1
grad_clip = 1.0
dropout = 0.0
bias = False
eval_interval = 500
log_interval = 100
