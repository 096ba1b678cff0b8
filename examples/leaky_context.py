"""The context mean as the causal-reduction paper's own code takes it. It LEAKS, to show it.

    python train.py configs/shakespeare.py --mixer_file=examples/leaky_context.py \\
        --mixer=causal_max_leak                 # refused
    python train.py configs/shakespeare.py --mixer_file=examples/leaky_context.py \\
        --mixer=causal_max_leak --allow_leak

Every token sees a mean of the whole sequence, with the tokens that it has to predict, so the loss
is too low. In a window's last position, where there is no future to see, stands the true one:

    python -m tools.score --out_dir=... --last_position --mixer_file=examples/leaky_context.py
"""
from functools import partial

import torch

from mixers import MIXERS
from mixers.causal_reduction import CausalReduction, pairwise


class LeakyContext(CausalReduction):
    """r_t = op(x_t, x_{t-1}, m), m = 1/T sum_s x_s over all s of the sequence, later ones too"""

    def forward(self, x, state=None):
        previous = torch.cat([x[:, :1], x[:, :-1]], dim=1)
        mean = x.mean(1, keepdim=True)  # the fault: over all of the sequence
        return self.c_proj(pairwise(self.op, pairwise(self.op, x, previous), mean)), state


for op in ("max", "min"):
    MIXERS[f"causal_{op}_leak"] = partial(LeakyContext, op=op)
