"""The Pelican paper's experiment (its Figure 3): the LLaMA baseline, tau 1. Base of the others.

    python train.py configs/cosmopedia_llama.py
    python -m tools.pelican_figure                 all four cells and the figure

Cells {softmax, pelican} x {tau 1, tau 0.1}: cosmopedia_llama.py and cosmopedia_pelican.py are the
paper's two, cosmopedia_llama_tau01.py and cosmopedia_pelican_tau1.py the two that it lacks.

Per step 32 x 128 = 4,096 tokens; 150 steps, the paper's figure, are 614,400. 6,250 steps would be
two epochs of the author's (2 x 100,000 documents / 32): the learning rate falls linearly to 0
there, so after 150 steps it is still 0.976 of its peak. Parameters: head 50,257 x 192 = 9.65M,
embedding 50,257 x 10 + 10 x 192 = 0.50M, a layer's FFN 3 x 192 x 512 = 0.295M and attention
2 x 192 x 192 + 2 x 192 x 96 = 0.111M: 15.0M in all, Pelican 13.7M.

Not as in the author's notebook: windows of one packed stream instead of documents cut or padded to
128 tokens; GPT-2's 50,257 tokens instead of 128,000 (the loss starts at ln 50,257 = 10.82, theirs
at 11.76); batch 32 for all cells, where the stored Pelican cell shows 2; bfloat16 where it is fast,
else float32, instead of fp16; AdamW's betas are torch's defaults, and weights other than the head
start from GPT-2's N(0, 0.02), neither of which we know of theirs.
"""
dataset = "cosmopedia"
arch = "llama"         # RMSNorm, RoPE, SwiGLU, untied head
mixer = "softmax"
head_temperature = 1.0
n_layer = 12
n_head = 4             # 48 channels a head
n_kv_head = 2
n_embd = 192
ffn_hidden = 512
ffn_bias = True
norm_eps = 1e-6
embed_rank = 10
zero_init_head = True
init_std = 0.02
block_size = 128
batch_size = 32
max_iters = 150
learning_rate = 1e-3
lr_schedule = "linear"
lr_decay_iters = 6250  # however many are run
min_lr = 0.0
warmup_iters = 0
beta2 = 0.999
weight_decay = 0.0
grad_clip = 1.0
eval_interval = 25
# 10 steps' worth of tokens: a tenth of the time; all of the data set `shakespeare`
eval_tokens = 40960
log_interval = 1
keep_last = 1          # a checkpoint takes 180 MB
