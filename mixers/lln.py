"""Linear Log-Normal attention (Nahshan, Kampeas, Haleva 2023, ICLR 2024, arXiv 2311.13541).

    phi_q(q) = exp(alpha q),  phi_k(k) = exp(beta k), element-wise
    y_t = phi_q(q_t)^T S_t / (phi_q(q_t)^T z_t)
    S_t = sum_{s<=t} phi_k(k_s) v_s^T,   z_t = sum_{s<=t} phi_k(k_s)

q, k, v, y (B, H, T, D), q and k rotated with `rotate_features` alone; alpha, beta (H). State: that
of `conv`, S, z and the key maximum, see mixers/parts/chunkwise.py.

Moment matching: alpha = s / sigma_q and beta = s / sigma_k, where s is such that the variance of
the log weights, log(phi_q(q) . phi_k(k)) over independent q and k, is softmax attention's,
sigma_q^2 sigma_k^2. No gradient goes through them.

Deviations:
- the reference code takes sigma over the whole batch and sequence, which shows every token the
  future. Here sigma comes from moving averages that the forward pass only collects for; training
  applies them once per optimiser step.
- the paper fits s^2 = (sigma_q^2 sigma_k^2 - b) / (2 a) with constants for D = 64
  (--lln_matching=published). By default s is read from a table made for the head size at hand.
"""
import functools
from typing import Literal

import torch
import torch.distributed as dist
import torch.nn as nn

from base.options import option
from mixers.parts.chunkwise import linear_attention, linear_attention_flops, linear_state_bytes
from mixers.parts.heads import FeatureQKV, Wide, merge_heads, qkv_flops, repeat_heads

PUBLISHED_A, PUBLISHED_B = 0.14855178, -0.35487039
DECAY = 0.99  # of the moving averages, per optimiser step
TABLE_STEP, TABLE_SIZE = 0.25, 65  # s = 0, 0.25, .. 16


@functools.cache
def matching_table(D):
    """The standard deviation of log(sum_d exp(s (x_d + y_d))), x and y from N(0, 1), for s = 0,
    TABLE_STEP, ...: (TABLE_SIZE,).

    Always the same numbers: its pairs come from a generator of its own, and the same pairs serve
    every s."""
    generator = torch.Generator().manual_seed(D)
    # on the CPU whatever the default device: the table is kept for later models
    pairs = torch.randn(2, 16384, D, generator=generator, device="cpu").sum(0)
    spread = []
    for i in range(TABLE_SIZE):
        log_weights = (i * TABLE_STEP * pairs).logsumexp(1)
        spread.append(log_weights.double().std())
    return torch.stack(spread).cummax(0).values.float()  # noise must not make it fall


class Matching(Wide):
    """s for which the log weights have the standard deviation `target`: the table read backwards,
    linearly, on the device. Targets beyond the table's end (9.4 at D = 128, 12.3 at D = 16) take
    its last entry."""

    def __init__(self, D):
        super().__init__()
        self.register_buffer("table", matching_table(D), persistent=False)

    def forward(self, target):
        i = torch.searchsorted(self.table, target).clamp(1, TABLE_SIZE - 1)
        low, high = self.table[i - 1], self.table[i]
        share = ((target - low) / (high - low)).clamp(max=1)
        return (i - 1 + share) * TABLE_STEP


class Moments(Wide):
    """Moving averages of the mean and the mean square of queries or keys, per head."""

    def __init__(self, heads):
        super().__init__()
        self.register_buffer("mean", torch.zeros(heads))
        self.register_buffer("square", torch.ones(heads))
        # of this step's forward passes: sums of their means, of their mean squares, and how many
        self.register_buffer("collected", torch.zeros(3, heads), persistent=False)

    @torch.no_grad()
    def collect(self, x):
        """x (B, heads, T, D)."""
        x = x.to(self.collected.dtype)
        mean, square = x.mean((0, 2, 3)), x.square().mean((0, 2, 3))
        self.collected += torch.stack([mean, square, torch.ones_like(mean)])

    @torch.no_grad()
    def update(self, decay=DECAY):
        """Moves the averages towards the mean over micro-batches and processes, all of the same
        size; with a decay of 0 onto it."""
        if dist.is_initialized():
            dist.all_reduce(self.collected)
        mean, square, count = self.collected
        weight = (1 - decay) * (count > 0).to(mean.dtype)  # nothing collected, nothing moves
        self.mean.lerp_(mean / count.clamp(min=1), weight)
        self.square.lerp_(square / count.clamp(min=1), weight)
        self.collected.zero_()

    def sigma(self):
        return (self.square - self.mean.square()).clamp(min=1e-12).sqrt()


class LLN(nn.Module):
    takes = "conv", "rotate_features"

    class Options:
        lln_matching: Literal["table", "published"] = option(
            "table",
            "LLN's moment matching: a table for the head size, or the paper's constants for D = 64")

    def __init__(self, config, layer):
        super().__init__()
        self.published = config.lln_matching == "published"
        self.c_attn = FeatureQKV(config)
        self.c_proj = nn.Linear(config.n_embd, config.n_embd, bias=config.bias)
        H, G, D = self.c_attn.sizes
        self.q_moments, self.k_moments = Moments(H), Moments(G)
        self.matching = Matching(D)
        self.fixed = None  # alpha and beta, once the statistics no longer move

    def alpha_beta(self):
        """alpha (H,) and beta (H,); a query head's s comes from its own sigma_q and its group's
        sigma_k."""
        H, G, _ = self.c_attn.sizes
        sigma_q, sigma_k = self.q_moments.sigma(), self.k_moments.sigma()
        target = sigma_q * sigma_k.repeat_interleave(H // G)
        if self.published:
            s = ((target.square() - PUBLISHED_B) / (2 * PUBLISHED_A)).sqrt()
        else:
            s = self.matching(target)
        return s / sigma_q, s / sigma_k.repeat_interleave(H // G)

    def lln(self, q, k, v, state):
        """q (B, H, T, D), k and v (B, G, T, D) -> y (B, H, T, D) and the state."""
        dtype = torch.promote_types(q.dtype, torch.float32)
        q, k = q.to(dtype), k.to(dtype)
        if self.training:
            self.q_moments.collect(q)
            self.k_moments.collect(k)
        alpha, beta = self.fixed or self.alpha_beta()
        H = q.size(1)
        k, v = repeat_heads(k, H), repeat_heads(v, H)
        return linear_attention(alpha[:, None, None] * q, beta[:, None, None] * k, v, state)

    def forward(self, x, state=None):
        conv, state = (None, None) if state is None else state
        q, k, v, conv = self.c_attn(x, conv)
        y, state = self.lln(q, k, v, state)
        return self.c_proj(merge_heads(y)), (conv, state)

    def apply_statistics(self):
        """Moves the averages by what was collected since the last call; once per optimiser step."""
        self.q_moments.update()
        self.k_moments.update()

    def ready_to_decode(self):
        self.fixed = self.alpha_beta()

    def flops_per_token(self, T):
        H, _, D = self.c_attn.sizes
        return qkv_flops(self) + linear_attention_flops(T, H, D, D)

    def state_bytes(self, T, dtype):
        H, _, D = self.c_attn.sizes
        return linear_state_bytes(H, D, D, dtype) + self.c_attn.state_bytes(dtype)
