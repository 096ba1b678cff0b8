"""python train.py configs/cosmopedia_linformer.py"""
from configs.cosmopedia import *

mixer = "linformer"
