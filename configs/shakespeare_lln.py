"""python train.py configs/shakespeare_lln.py"""
from configs.shakespeare import *

mixer = "lln"
