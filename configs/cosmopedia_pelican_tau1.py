"""The Pelican paper's Pelican without its temperature; see cosmopedia_llama.py.

    python train.py configs/cosmopedia_pelican_tau1.py
"""
from configs.cosmopedia_pelican import *

head_temperature = 1.0
