"""Tiny Shakespeare by characters: the most that a small budget gives any mixer, in about a minute.

    python train.py configs/shakespeare.py --mixer=lln

As many parameters and tokens as nanoGPT's CPU demo, which is shakespeare_nanogpt.py: four layers of
128 channels, 1.5M characters. What differs is what helped every mixer that was tried: weights that
start from 1 / sqrt(n_embd), Muon, and a rate that falls to zero in a straight line.
"""
dataset = "shakespeare_char"
n_layer = 4
n_head = 4
n_embd = 128       # 32 channels a head
block_size = 64
batch_size = 12    # 12 x 64 = 768 tokens a step
max_iters = 2000   # 1.5M tokens, one and a half times the training split
optimizer = "muon"
learning_rate = 6e-3
lr_schedule = "linear"
min_lr = 0.0
warmup_iters = 100
beta2 = 0.99       # few tokens a step: a long memory for the second moment
weight_decay = 0.1
grad_clip = 1.0
dropout = 0.0
bias = False
eval_interval = 500
log_interval = 50

# Positions by rule, not by search: RoPE for softmax attention, also beside causal reductions, which
# tell a token from the one before it by themselves; none where a mechanism's own decay, convolution
# or rotation says how far back a token is; otherwise learned ones
_rope, _none = dict(pos="rope"), dict(pos="none")
per_mixer = {
    "softmax": _rope,
    "swa": _rope,
    "ssa": _rope,
    "linformer": _rope | dict(linformer_segment=16),  # of 64 it would be softmax attention
    "softmax,causal_max": _rope,
    "gla": _none,
    "retnet": _none,
    "mamba2": _none,
    "deltanet": _none,
    "gated_deltanet": _none,
    "kda": _none,
    "regla": _none,
    # tau 0.1 makes a tied head's first loss 23 nats; the paper's head starts at zero
    "pelican": dict(tie_head=False, zero_init_head=True),
}
