"""The short causal convolution in front of q, k and v of today's linear mixers, after which SiLU;
`--conv` gives it to every mixer that has q, k and v, or takes it away.

    u_t = SiLU(sum_{j<K} W_j * z_{t-K+1+j}),    z_t = 0 before the start

z, u (B, T, C), W (K, C): each channel by itself, K taps. It gives a layer n-gram features at the
price of K C parameters. State: the last K - 1 inputs (B, K - 1, C), zeros before the start.

Source: Mamba (Gu and Dao 2023, arXiv 2312.00752); start uniform in +-1 / sqrt(K), PyTorch's Conv1d.
"""
import math

import torch
import torch.nn as nn
import torch.nn.functional as F

from base.gradients import differentiable_once
from mixers.parts.products import to_dtype


class ShortConvolution(nn.Module):
    def __init__(self, channels, taps, bias=False):
        super().__init__()
        self.channels, self.taps = channels, taps
        # flat, so that weight decay, which is for matrices, leaves it alone
        self.weight = nn.Parameter(torch.empty(taps * channels))
        nn.init.uniform_(self.weight, -1 / math.sqrt(taps), 1 / math.sqrt(taps))
        self.bias = nn.Parameter(torch.zeros(channels)) if bias else None

    def forward(self, z, state=None):
        B, T, C = z.shape
        if state is None:
            state = z.new_zeros(B, self.taps - 1, C)
        padded = torch.cat([to_dtype(state, z.dtype), z], dim=1)
        if T == 1:  # decoding: one sum, at the weight's own precision
            u = (padded * self.weight.view(self.taps, C)).sum(1, keepdim=True)
        else:
            u = Taps.apply(padded, self.weight.to(z.dtype).view(self.taps, C))
        if self.bias is not None:
            u = u + self.bias.to(u.dtype)
        # a view of the inputs would keep all of them alive
        return to_dtype(F.silu(u), z.dtype), padded[:, T:].clone()

    def flops_per_token(self):
        return 2 * self.weight.numel()

    def state_bytes(self, dtype):
        return (self.taps - 1) * self.channels * dtype.itemsize


class Taps(torch.autograd.Function):
    """sum_{j<K} W_j * padded_{t+j} (B, T, C), for padded (B, T + K - 1, C) and W (K, C). The
    gradient is written out: recorded, each tap's would be a tensor of zeros with one slice filled,
    and then their sum."""

    @staticmethod
    def forward(ctx, padded, weight):
        ctx.save_for_backward(padded, weight)
        first, *others = windows(padded, len(weight))
        u = first * weight[0]
        for window, w in zip(others, weight[1:]):
            u.addcmul_(window, w)
        return u

    @staticmethod
    @differentiable_once
    def backward(ctx, du):
        padded, weight = ctx.saved_tensors
        d_padded, d_weight = torch.zeros_like(padded), torch.empty_like(weight)
        for j, window in enumerate(windows(padded, len(weight))):
            torch.sum(du * window, (0, 1), out=d_weight[j])
        for window, w in zip(windows(d_padded, len(weight)), weight):
            window.addcmul_(du, w)
        return d_padded, d_weight


def windows(padded, taps):
    """What each tap meets: the tokens (B, T, C) from the tap's place on, as views."""
    T = padded.size(1) - taps + 1
    return [padded[:, j:j + T] for j in range(taps)]


class SiLUAlone(nn.Module):
    """What is left where `conv` is 0 in a mechanism that has the convolution: its SiLU."""

    def forward(self, z, state=None):
        return F.silu(z), state

    def flops_per_token(self):
        return 0

    def state_bytes(self, dtype):
        return 0
