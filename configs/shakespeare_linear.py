"""python train.py configs/shakespeare_linear.py"""
from configs.shakespeare import *

mixer = "linear"
