"""Victorian books in 4,096 tokens of their own: the smallest of three sizes on a text that no run
exhausts, with contexts of 512 tokens. Base of the others.

    python train.py configs/books.py --mixer=gated_deltanet

Four layers of 64 channels have 0.2M parameters (and 0.26M in the vocabulary); 3.9M tokens are 20
for each of them, a tenth of the training authors'. The options are those of shakespeare.py, where
they were chosen; nothing has been tried out on this text but the rates.
"""
dataset = "books_bpe"
n_layer = 4
n_head = 2
n_embd = 64        # 32 channels a head
block_size = 512
batch_size = 8     # 8 x 512 = 4,096 tokens a step
max_iters = 960
optimizer = "muon"
learning_rate = 8e-3
lr_schedule = "linear"
min_lr = 0.0
warmup_iters = 48  # a twentieth, as there
beta2 = 0.99
weight_decay = 0.1
grad_clip = 1.0
dropout = 0.0
bias = False
eval_interval = 480
eval_tokens = 2**18  # of 1.8M, spread over the authors
log_interval = 48

# the rule for positions of shakespeare.py
_rope, _none = dict(pos="rope"), dict(pos="none")
per_mixer = {
    "softmax": _rope,
    "swa": _rope,
    "ssa": _rope,
    "softmax,causal_max": _rope,
    "gated_deltanet,gated_deltanet,gated_deltanet,softmax": _none,
    "gla": _none,
    "mamba2": _none,
    "deltanet": _none,
    "gated_deltanet": _none,
    "kda": _none,
}
