"""The Pelican paper's Pelican, tau 0.1, in the setting of cosmopedia_llama.py.

    python train.py configs/cosmopedia_pelican.py

Its FFN has no biases (12 x 1,216 parameters fewer), as in the author's notebook.
"""
from configs.cosmopedia_llama import *

mixer = "pelican"
ffn_bias = False
head_temperature = 0.1
