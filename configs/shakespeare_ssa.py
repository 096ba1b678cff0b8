"""python train.py configs/shakespeare_ssa.py"""
from configs.shakespeare import *

mixer = "ssa"
