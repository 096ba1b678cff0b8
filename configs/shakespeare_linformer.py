"""python train.py configs/shakespeare_linformer.py"""
from configs.shakespeare import *

mixer = "linformer"
