"""python train.py configs/shakespeare_softmax.py"""
from configs.shakespeare import *

mixer = "softmax"
