"""python train.py configs/shakespeare_causal_min.py"""
from configs.shakespeare import *

mixer = "causal_min"
