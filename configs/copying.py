"""python train.py configs/copying.py"""
from configs.mqar import *

dataset = "copying"
