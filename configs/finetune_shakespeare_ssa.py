"""finetune_shakespeare_softmax.py with SSA's temperatures, which leave GPT-2 as it is at the start.

    python train.py configs/finetune_shakespeare_ssa.py

--train_only=mixer_new --learning_rate=1e-3 trains the temperatures alone.
"""
from configs.finetune_shakespeare_softmax import *

mixer = "ssa"
