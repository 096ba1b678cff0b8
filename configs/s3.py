"""The word problem of S3 on a laptop: the order of three things that change places, also in rows
twice as long as trained on.

    python train.py configs/s3.py --mixer=deltanet --deltanet_negative

A guess is right in 0.17 of the answers.
"""
from configs.mqar import *

dataset = "s3"
block_size = 16    # rows of up to 32 are tested
pos = "rope"       # learned positions would end at 16
batch_size = 512   # 512 x 16 = 8,192 tokens a step
