"""python train.py configs/cosmopedia_causal_max.py"""
from configs.cosmopedia import *

mixer = "causal_max"
