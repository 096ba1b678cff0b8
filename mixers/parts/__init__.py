"""What several mixers share: heads, caches and rotary positions; the two engines, chunkwise.py and
recurrence.py with its decays.py; the short convolution and the heads of recurrent mixers;
attention and float32 products on a CPU."""
