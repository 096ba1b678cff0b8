"""What several mixers share: heads, caches and rotary positions; the two engines, chunkwise.py and
recurrence.py; the short convolution and the heads of recurrent mixers; attention on a CPU."""
