"""Pelican (Alvi 2025, "Toward Efficient Sequence Modeling with Temperature assisted Information
Gating").

No token mixing at all: the block is h = h + FFN(norm(h)), with one norm, no mixer and no output
projection. After the last norm the hidden states (B, T, C) are divided by a temperature tau before
the head: logits = W_head (h / tau).

tau belongs to the head (`--head_temperature`, usable with every mixer; default 0.1 if all layers
are pelican). It multiplies the head's effective learning rate, so an honest comparison has four
cells: {softmax, pelican} x {tau 1, 0.1}. What to expect: each position sees one character or token,
so the loss can never fall below the entropy of bigrams: 2.482 nats per character on tiny
Shakespeare's validation split for a bigram model that counts.
"""

Pelican = None  # nothing to build: model.Block leaves out the mixer and the norm before it
