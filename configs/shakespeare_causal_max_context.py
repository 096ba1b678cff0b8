"""python train.py configs/shakespeare_causal_max_context.py"""
from configs.shakespeare import *

mixer = "causal_max_context"
