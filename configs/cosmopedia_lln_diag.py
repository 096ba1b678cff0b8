"""python train.py configs/cosmopedia_lln_diag.py"""
from configs.cosmopedia import *

mixer = "lln_diag"
