"""GPT-2 small on cosmopedia, for one GPU and any mixer. Not run by us.

    python train.py configs/cosmopedia.py --mixer=ssa

cosmopedia_llama*.py and cosmopedia_pelican*.py are another setting: the Pelican paper's.

Positions are learned, as GPT-2's: RoPE would leave lln, linear and the reductions without any, so
mixers would not differ alone. Per step 16 x 8 x 1,024 = 131,072 tokens; 2,000 steps are 262M, some
three times the data set, if its documents have the 800 tokens of the whole cosmopedia's.
6 x 124M x 262M = 2e17 FLOPs: half an hour at 100 TFLOP/s.

Memory, by arithmetic: 124.3M parameters (causal_max* 103.1M) in float32 0.50 GB, gradients 0.50,
AdamW's moments 0.99, bfloat16 copies of the matrices 0.25; logits, 333 tokens at a time, 0.3; what
a layer keeps for its backward pass, in bytes per token and channel:
    softmax, causal_max 36    causal_max_context 44    ssa 46    linformer 54    lln 54
    lln_diag, linear 71       performer 101
times 16 x 1,024 tokens x 768 channels x 12 layers: softmax 5.4 GB, performer 15.2 GB. So 8 to 18 GB
in all; for less, halve batch_size and double gradient_accumulation_steps. The bytes were counted on
a CPU, as the tensors that autograd saves.
"""
dataset = "cosmopedia"
n_layer = 12
n_head = 12
n_embd = 768       # 64 channels a head
pos = "learned"
bias = False
init_std = 0.02
block_size = 1024
batch_size = 16
gradient_accumulation_steps = 8
max_iters = 2000
learning_rate = 6e-4   # to 6e-5 by cosine; nanoGPT's for GPT-2, as are beta2 and weight_decay
warmup_iters = 200
beta2 = 0.95
weight_decay = 0.1
grad_clip = 1.0
eval_interval = 250
log_interval = 10
keep_last = 1          # a checkpoint takes 1.5 GB
