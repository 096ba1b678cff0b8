"""python train.py configs/shakespeare_causal_max.py"""
from configs.shakespeare import *

mixer = "causal_max"
