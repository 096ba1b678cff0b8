"""python train.py configs/shakespeare_linformer.py"""
from configs.shakespeare import *

mixer = "linformer"
linformer_segment = 16  # a segment as long as the block would make it softmax attention
