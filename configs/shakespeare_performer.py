"""python train.py configs/shakespeare_performer.py"""
from configs.shakespeare import *

mixer = "performer"
