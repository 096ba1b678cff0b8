"""python train.py configs/cosmopedia_causal_max_context.py"""
from configs.cosmopedia import *

mixer = "causal_max_context"
