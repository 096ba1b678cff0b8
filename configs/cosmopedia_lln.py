"""LLN in the setting of cosmopedia.py; for one GPU.

    python train.py configs/cosmopedia_lln.py
"""
from configs.cosmopedia import *

mixer = "lln"
