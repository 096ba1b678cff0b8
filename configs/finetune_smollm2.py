"""SmolLM2-135M goes on with Victorian books: softmax attention, or what leaves it as it is at the
start.

    python data/books/prepare.py --tokenizer=smollm2 --name=books_smollm2     once, minutes
    python train.py configs/finetune_smollm2.py                               all parameters
    python train.py configs/finetune_smollm2.py --mixer=ssa

--train_only=mixer_new --learning_rate=1e-3 trains SSA's temperatures alone.
0.8M tokens, over an hour of one free CPU core at about 200 tokens a second, and 5.4 GB of memory.
The weights come from 4 bits each, so what is gained first repairs their rounding, whatever the
mixer: compare with softmax attention trained as long, never with the start. claims/ssa_smollm2.toml
does.
"""
init_from = "smollm2"
dataset = "books_smollm2"
block_size = 1024
batch_size = 2         # 2 x 1,024 = 2,048 tokens a step
max_iters = 400        # 0.8M tokens of 32.6M
learning_rate = 1e-4
lr_schedule = "linear"
min_lr = 0.0
warmup_iters = 40
weight_decay = 0.0     # few steps: nothing to be kept from growing
beta2 = 0.95
eval_interval = 200    # a checkpoint each, of 1.6 GB
eval_tokens = 2**16    # 64 windows of the validation split, 270,000 bytes
log_interval = 10
keep_last = 1
