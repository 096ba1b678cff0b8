"""nanoGPT's CPU demo on tiny Shakespeare, by characters: a minute or two on a laptop.

    python train.py configs/shakespeare_nanogpt.py --mixer=lln

A demo, tuned for no mixer: from these weights attention learns late. For comparisons there is
shakespeare.py.

Expect, on the second half of the validation text, five seeds: softmax 1.92 nats a character,
causal_max 1.78, lln 1.94, pelican 2.50. Linformer wants --linformer_segment=16: in segments of 64
tokens, as long as the context, it would be softmax attention.
"""
dataset = "shakespeare_char"
n_layer = 4
n_head = 4
n_embd = 128       # 32 channels a head
block_size = 64
batch_size = 12    # 12 x 64 = 768 tokens a step
max_iters = 2000   # 1.5M tokens, one and a half times the training split
learning_rate = 1e-3   # to 1e-4 by cosine
warmup_iters = 100
init_std = 0.02    # GPT-2's
beta2 = 0.99       # few tokens a step: a long memory for the second moment
weight_decay = 0.1
grad_clip = 1.0
dropout = 0.0
bias = False
eval_interval = 500
log_interval = 50
