"""python train.py configs/cosmopedia_linear.py"""
from configs.cosmopedia import *

mixer = "linear"
