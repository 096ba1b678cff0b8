"""Multi-query associative recall on a laptop: two layers, 64 channels. Base of the recall tasks.

    python train.py configs/mqar.py --mixer=lln
    python train.py --eval_only --eval_split=test --out_dir=out/mqar_lln

A minute or two on one core. Expect an accuracy of 1.00 on the test split for softmax and 0.03, that
of a guess, for causal_max; any value of the row is right in 0.11.
"""
dataset = "mqar"
n_layer = 2        # one to bind a value to its key, one to look it up
n_head = 2
n_embd = 64        # 32 channels a head
ffn_hidden = 128   # 2 C: there is little to compute
pos = "learned"    # RoPE would leave lln, linear and the reductions without positions
# about 1 / sqrt(C): on rows of 32 tokens softmax was done in 350 steps, from 0.02 not in 1,100
init_std = 0.1
block_size = 64    # the length of a row
batch_size = 128   # 128 x 64 = 8,192 tokens a step
max_iters = 800
optimizer = "muon"
learning_rate = 8e-3   # to 8e-4 by cosine
warmup_iters = 100
beta2 = 0.99
weight_decay = 0.1
grad_clip = 1.0
dropout = 0.0
bias = False
eval_interval = 100
log_interval = 50
