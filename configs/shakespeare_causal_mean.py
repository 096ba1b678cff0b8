"""python train.py configs/shakespeare_causal_mean.py"""
from configs.shakespeare import *

mixer = "causal_mean"
