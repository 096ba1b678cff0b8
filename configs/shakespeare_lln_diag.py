"""python train.py configs/shakespeare_lln_diag.py"""
from configs.shakespeare import *

mixer = "lln_diag"
