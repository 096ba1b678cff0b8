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
        padded = torch.cat([state.to(z.dtype), z], dim=1)
        weight = self.weight.to(z.dtype).view(self.taps, C)
        u = padded[:, :T] * weight[0]
        for j in range(1, self.taps):
            u = torch.addcmul(u, padded[:, j:j + T], weight[j])
        if self.bias is not None:
            u = u + self.bias.to(z.dtype)
        return F.silu(u), padded[:, T:].clone()  # a view would keep all inputs alive

    def flops_per_token(self):
        return 2 * self.weight.numel()

    def state_bytes(self, dtype):
        return (self.taps - 1) * self.channels * dtype.itemsize
