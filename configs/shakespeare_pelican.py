"""Pelican, whose blocks have no mixer, in the setting of shakespeare.py: half a minute.

    python train.py configs/shakespeare_pelican.py

Expect 2.48 nats a character: it sees one token, and a table of pairs of characters does as well.
"""
from configs.shakespeare import *

mixer = "pelican"
