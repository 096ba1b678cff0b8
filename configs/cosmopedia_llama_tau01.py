"""The Pelican paper's baseline with Pelican's temperature; see cosmopedia_llama.py.

    python train.py configs/cosmopedia_llama_tau01.py
"""
from configs.cosmopedia_llama import *

head_temperature = 0.1
