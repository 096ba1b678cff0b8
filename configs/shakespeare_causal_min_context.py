"""python train.py configs/shakespeare_causal_min_context.py"""
from configs.shakespeare import *

mixer = "causal_min_context"
