"""Top-Theta attention (Berestizshevsky et al. 2025, arXiv 2502.08363): of a trained softmax
attention, only the scores above a threshold.

With s_tj = q_t . k_j / sqrt(D) over the n = t + 1 visible tokens j, head h keeps

    pre     the j with s_tj > theta_h(n);           w_tj = exp(s_tj) / (sum over these + missing)
    post    the j with softmax(s_t)_j > theta_h(n); w_tj = softmax(s_t)_j, not scaled up again

and y_t = sum of w_tj v_j over these. Everything is kept where n <= k, and always the largest.
theta_h(n) is calibrated so that about k remain: python -m tools.calibrate makes a run with this
mixer from one with softmax; until then everything is kept, and this is softmax. Beyond block_size
theta is that of block_size. missing (--toptheta_sdc) makes up for what was dropped:

    none        0: softmax over what is kept
    exact       the sum of exp(s_tj) over what was dropped
    threshold   exp(theta_h(n)) for each that was dropped
    offline     exp(largest s_tj) times a calibrated number for each h and n

The weight that then lacks to 1 may go to the mean of the values (--toptheta_vmc): y_t += (1 - sum_j
w_tj) 1/n sum_{j<=t} v_j. q (B, H, T, D); k, v (B, G, T, D) with G = n_kv_head groups. Scores are
also divided by `attn_temperature`. State: that of `conv`, the key/value cache and, for that mean,
the sum of the values.

theta depends on n alone, not on how the tokens came. A score within rounding of theta may still be
kept in one call and dropped in another. What this saves is reads of values, which tools.calibrate
counts; here all products are dense and nothing is faster.
"""
import math
from typing import Any, Literal, NamedTuple

import torch
import torch.nn as nn

from base.errors import BadInput
from base.options import option
from mixers.parts.heads import (
    Cache,
    ConvolvedQKV,
    Wide,
    attention_scores,
    cache_bytes,
    causal_attention_flops,
    merge_heads,
    qkv_flops,
    repeat_heads,
    rotate,
    tempered,
)

BLOCK = 256  # queries at a time, so that without gradients memory is linear in T


class Thresholds(Wide):
    """theta and missing (H, block_size), column n - 1 for a row that sees n tokens."""

    def __init__(self, H, k, block_size):
        super().__init__()
        self.k = k
        # finite, so that a checkpoint with it is sound: below every score
        self.register_buffer("theta", torch.full((H, block_size), torch.finfo(torch.float32).min))
        self.register_buffer("missing", torch.zeros(H, block_size))

    def forward(self, values, n):
        """Which are kept (B, H, T, S), bool, of scores or probabilities (B, H, T, S) in rows that
        see the first n (T) tokens."""
        visible = torch.arange(values.size(3), device=n.device) < n[:, None]
        kept = (values > of_rows(self.theta, n)) | (values == values.amax(3, keepdim=True))
        return (kept | (n <= self.k)[:, None]) & visible


def of_rows(table, n):
    """The entries (H, T, 1) of a table (H, block_size) for rows that see n (T) tokens."""
    return table[:, (n - 1).clamp(max=table.size(1) - 1), None]


def running_mean(v, before, total):
    """The mean (B, G, T, D) of the values so far for each token of v (B, G, T, D), in at least
    float32, and their sum (B, G, 1, D); total: that of the `before` tokens before, or None."""
    sums = v.to(torch.promote_types(v.dtype, torch.float32)).cumsum(2)
    if total is not None:
        sums = sums + total
    n = torch.arange(before + 1, before + v.size(2) + 1, device=v.device)
    return sums / n[:, None], sums[:, :, -1:].clone()


class State(NamedTuple):
    """That of `conv`, the cache, and the sum of the values (B, G, 1, D) in at least float32, or
    None."""
    conv: Any
    cache: Cache
    total: Any


class TopTheta(nn.Module):
    takes = "conv", "attn_temperature"

    class Options:
        toptheta_k: int = option(
            64, "scores of a row that Top-Theta's thresholds are calibrated to keep", ge=1)
        toptheta_placement: Literal["pre", "post"] = option(
            "pre", "Top-Theta's thresholds are for scores, before the softmax, or for its weights")
        toptheta_sdc: Literal["none", "exact", "threshold", "offline"] = option(
            "none", "what Top-Theta's denominator, of placement pre, has for the dropped scores")
        toptheta_vmc: bool = option(
            False, "Top-Theta gives the weight that lacks to 1 to the mean of the values")

    def __init__(self, config, layer):
        super().__init__()
        self.rope_base = config.rope_base if config.pos == "rope" else None
        self.pre, self.sdc = config.toptheta_placement == "pre", config.toptheta_sdc
        if not self.pre and self.sdc != "none":
            raise BadInput(f"toptheta_sdc {self.sdc!r} is for toptheta_placement 'pre': after the "
                           "softmax the denominator is whole; leave it out")
        self.vmc = config.toptheta_vmc
        self.temperature = config.attn_temperature
        self.c_attn = ConvolvedQKV(config)
        self.c_proj = nn.Linear(config.n_embd, config.n_embd, bias=config.bias)
        self.thresholds = Thresholds(config.n_head, config.toptheta_k, config.block_size)

    def forward(self, x, state=None):
        conv, cache, total = state or (None, None, None)
        q, k, v, conv = self.c_attn(x, conv)
        T = x.size(1)
        before = 0 if cache is None else cache.k.size(2)
        if self.rope_base:
            q, k = rotate(q, before, self.rope_base), rotate(k, before, self.rope_base)
        q = tempered(q, self.temperature)
        cache = Cache.append(cache, k, v)
        keys, values = repeat_heads(cache.k, q.size(1)), repeat_heads(cache.v, q.size(1))
        blocks = []
        for start in range(0, T, BLOCK):
            end = min(start + BLOCK, T)
            seen = before + end
            blocks.append(self.attend(q[:, :, start:end], keys[:, :, :seen], values[:, :, :seen]))
        y, weight = (torch.cat(parts, dim=2) for parts in zip(*blocks))
        if self.vmc:
            mean, total = running_mean(v, before, total)
            y = y + ((1 - weight) * repeat_heads(mean, q.size(1))).to(y.dtype)
        return self.c_proj(merge_heads(y)), State(conv, cache, total)

    def attend(self, q, k, v):
        """y (B, H, T, D) for the last T of S tokens, q (B, H, T, D), k and v (B, H, S, D), and the
        sum of each row's weights (B, H, T, 1)."""
        T, S = q.size(2), k.size(2)
        n = torch.arange(S - T + 1, S + 1, device=q.device)
        later = torch.arange(S, device=q.device) >= n[:, None]
        scores = attention_scores(q, k).masked_fill(later, -math.inf)
        if self.pre:
            weights = self.weights_of(scores, self.thresholds(scores, n), n)
        else:
            weights = scores.softmax(-1)
            weights = weights * self.thresholds(weights, n)
        return weights.to(v.dtype) @ v, weights.sum(3, keepdim=True)

    def weights_of(self, scores, kept, n):
        """The weights (B, H, T, S) of scores of which some are kept before the softmax."""
        largest = scores.amax(3, keepdim=True)
        terms = (scores - largest).exp()
        total = (terms * kept).sum(3, keepdim=True)
        if self.sdc == "exact":
            total = terms.sum(3, keepdim=True)
        if self.sdc == "threshold":
            dropped = n[:, None] - kept.sum(3, keepdim=True)
            # no dropped score is above the largest, whatever theta is
            of_each = (of_rows(self.thresholds.theta, n) - largest).clamp(max=0).exp()
            total = total + dropped * of_each
        if self.sdc == "offline":
            total = total + of_rows(self.thresholds.missing, n)
        return terms * kept / total

    def be_neutral(self):
        """The names of the buffers that a softmax model lacks; fresh ones keep everything."""
        return {f"thresholds.{name}" for name in self.thresholds.state_dict()}

    def flops_per_token(self, T):
        return qkv_flops(self) + causal_attention_flops(self.c_attn.sizes, T)

    def state_bytes(self, T, dtype):
        _, G, D = self.c_attn.sizes
        total = G * D * torch.promote_types(dtype, torch.float32).itemsize if self.vmc else 0
        cache = cache_bytes(self.c_attn.sizes, T, dtype)
        return cache + total + self.c_attn.state_bytes(dtype)
