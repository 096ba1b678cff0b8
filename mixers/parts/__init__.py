"""What several mixers share: heads, caches and rotary positions; the chunkwise engine; attention
on a CPU."""
