"""python train.py configs/cosmopedia_performer.py"""
from configs.cosmopedia import *

mixer = "performer"
