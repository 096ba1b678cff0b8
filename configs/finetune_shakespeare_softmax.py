"""GPT-2 (124M) tuned on tiny Shakespeare, by its own BPE: for a GPU.

    python train.py configs/finetune_shakespeare_softmax.py

With --max_iters=0: GPT-2's own validation loss.
"""
init_from = "gpt2"     # the model's options come with it
dataset = "shakespeare"
batch_size = 8
gradient_accumulation_steps = 4   # 8 x 4 x 1024 = 32,768 tokens a step
max_iters = 40         # 1.3M tokens, four times the training split
learning_rate = 3e-5
decay_lr = False
warmup_iters = 0
eval_interval = 5
log_interval = 1
keep_last = 1          # a checkpoint takes 1.5 GB
