"""python train.py configs/shakespeare_causal_mean_context.py"""
from configs.shakespeare import *

mixer = "causal_mean_context"
