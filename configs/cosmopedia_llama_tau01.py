"""The Pelican paper's baseline with Pelican's temperature: python train.py configs/cosmopedia_llama_tau01.py"""
from configs.cosmopedia_llama import *

head_temperature = 0.1
