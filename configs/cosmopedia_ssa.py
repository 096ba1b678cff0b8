"""python train.py configs/cosmopedia_ssa.py"""
from configs.cosmopedia import *

mixer = "ssa"
