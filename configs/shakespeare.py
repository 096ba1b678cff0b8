"""Tiny Shakespeare by characters: the most that a small budget gives any mixer, in about a minute.

    python train.py configs/shakespeare.py --mixer=lln

As many parameters and tokens as nanoGPT's CPU demo, which is shakespeare_nanogpt.py: four layers of
128 channels, 1.5M characters. What differs is what helped the mixers it was tried with: weights
that start from 1 / sqrt(n_embd), Muon, and a rate that falls to zero in a straight line. Each has
the rate that did best on text held out of training (results/shakespeare and shakespeare_later;
kda's is untried).

Expect, on the validation text, in nats: mamba2 1.56, softmax 1.58, causal_max and lln 1.62.
"""
dataset = "shakespeare_char"
n_layer = 4
n_head = 4
n_embd = 128       # 32 channels a head
block_size = 64
batch_size = 12    # 12 x 64 = 768 tokens a step
max_iters = 2000   # 1.5M tokens, one and a half times the training split
optimizer = "muon"
learning_rate = 8e-3   # but for those below
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

# Positions by one rule for all, written after a few trials: RoPE for softmax attention, also beside
# causal reductions, which tell a token from the one before it by themselves; none where a
# mechanism's own decay, convolution or rotation tells how far back a token is; otherwise learned
_rope, _none = dict(pos="rope"), dict(pos="none")
_low = dict(learning_rate=4e-3)
per_mixer = {
    "softmax": _rope,
    "swa": _rope,
    "ssa": _rope | _low,
    "linformer": _rope | dict(linformer_segment=16),  # of 64 it would be softmax attention
    "softmax,causal_max": _rope,
    "lln_diag": _low,
    "causal_max": _low,
    "causal_min": _low,
    "causal_max_context": _low,
    "causal_min_context": dict(learning_rate=16e-3),
    "lln,causal_max": _low,
    "gla": _none,
    "retnet": _none,
    "mamba2": _none | _low,
    "deltanet": _none | dict(learning_rate=16e-3),
    "gated_deltanet": _none | _low,
    "kda": _none,
    "regla": _none,
    # tau 0.1 makes a tied head's first loss 23 nats; the paper's head starts at zero
    "pelican": dict(tie_head=False, zero_init_head=True) | _low,
}
