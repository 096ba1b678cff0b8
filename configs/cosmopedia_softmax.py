"""python train.py configs/cosmopedia_softmax.py"""
from configs.cosmopedia import *

mixer = "softmax"
