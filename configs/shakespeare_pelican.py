"""python train.py configs/shakespeare_pelican.py"""
from configs.shakespeare import *

mixer = "pelican"
