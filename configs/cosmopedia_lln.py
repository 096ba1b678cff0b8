"""python train.py configs/cosmopedia_lln.py"""
from configs.cosmopedia import *

mixer = "lln"
