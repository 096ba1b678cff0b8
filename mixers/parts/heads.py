"""What the mixers with queries, keys and values share: heads, rotary positions, the key/value
cache, causal attention.

B batch, T new tokens, S tokens so far (S >= T), H heads, G key/value heads, D head size.
"""
import functools
import math
from typing import Any, NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F

from base.gradients import differentiable_once
from mixers.parts.convolution import ShortConvolution
from mixers.parts.cpu_attention import (
    FLASH,
    KEPT,
    LONG,
    MANY,
    blocked_attention,
    continued_attention,
)
from mixers.parts.products import exact_product, fast_products

MANY_ROWS = 8  # from which on a compiled step of one token gains by loops over the cache


class QKV(nn.Module):
    """x (B, T, C) -> queries (B, H, T, D), keys and values (B, G, T, D) in one product."""

    def __init__(self, config):
        super().__init__()
        self.sizes = config.n_head, config.n_kv_head, config.n_embd // config.n_head
        H, G, D = self.sizes
        self.proj = nn.Linear(config.n_embd, (H + 2 * G) * D, bias=config.bias)

    def forward(self, x):
        return self.heads(self.proj(x))

    def heads(self, z):
        B, T, _ = z.shape
        H, G, D = self.sizes
        q, k, v = z.split([H * D, G * D, G * D], dim=2)
        return (t.view(B, T, -1, D).transpose(1, 2) for t in (q, k, v))


class ConvolvedQKV(QKV):
    """The same with `conv`: through a short convolution, if there are taps. x (B, T, C), state ->
    q, k, v and the new state, the convolution's or None."""

    def __init__(self, config):
        super().__init__(config)
        self.conv = None
        if config.conv:
            self.conv = ShortConvolution(self.proj.out_features, config.conv)

    def forward(self, x, state=None):
        z = self.proj(x)
        if self.conv is not None:
            z, state = self.conv(z, state)
        return *self.heads(z), state

    def state_bytes(self, dtype):
        return self.conv.state_bytes(dtype) if self.conv is not None else 0


class FeatureQKV(ConvolvedQKV):
    """The same for mixers that leave q and k unrotated: with `rotate_features` they are rotated
    here, and the state is a pair, the convolution's and how many tokens there were."""

    def __init__(self, config):
        super().__init__(config)
        self.rope_base = config.rope_base if config.rotate_features else None

    def forward(self, x, state=None):
        if self.rope_base is None:
            return super().forward(x, state)
        conv, n = state or (None, 0)
        q, k, v, conv = super().forward(x, conv)
        q, k = rotate(q, n, self.rope_base), rotate(k, n, self.rope_base)
        return q, k, v, (conv, n + x.size(1))


class Wide(nn.Module):
    """A module whose buffers stay in at least float32 when the model around it is cast to less."""

    def _apply(self, fn, recurse=True):
        def keep_wide(tensor):
            cast = fn(tensor)
            return cast if cast.dtype.itemsize >= 4 else tensor.to(cast.device, torch.float32)
        return super()._apply(keep_wide, recurse)


def qkv_flops(mixer):
    """Forward FLOPs per token of a mixer's projections, c_attn, its convolution among them, and
    c_proj; a multiply-add is 2."""
    conv = getattr(mixer.c_attn, "conv", None)
    taps = conv.flops_per_token() if conv is not None else 0
    return taps + 2 * (mixer.c_attn.proj.weight.numel() + mixer.c_proj.weight.numel())


def tempered(q, temperature):
    """Queries q (B, H, T, D) whose scores are divided by a temperature: `attn_temperature`, the
    TempScale of Zhou et al. 2024, arXiv 2410.24200."""
    return q if temperature == 1 else q / temperature


def merge_heads(y):
    """(B, H, T, D) -> (B, T, H D)."""
    return y.transpose(1, 2).flatten(2)


def repeat_heads(t, n_head):
    """Grouped keys or values (B, G, T, D) -> (B, H, T, D); query head h uses group h // (H / G)."""
    return t if t.size(1) == n_head else t.repeat_interleave(n_head // t.size(1), dim=1)


def rotate(x, start, base):
    """RoPE (Su et al. 2021, arXiv 2104.09864) on x (B, H, T, D) at absolute positions start,
    start + 1, ...

    Channel i is paired with channel i + D/2, as in LLaMA's published weights; angles in float32
    (float64 stays)."""
    T, D = x.shape[-2:]
    dtype = torch.promote_types(x.dtype, torch.float32)
    form = rotation.__wrapped__ if torch.compiler.is_compiling() else rotation
    cos, sin = form(start, T, D, base, dtype, x.device, torch.is_inference_mode_enabled())
    a, b = x.to(dtype).chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1).to(x.dtype)


@functools.lru_cache(maxsize=1)
def rotation(start, T, D, base, dtype, device, in_inference_mode):
    """The cosines and sines (T, D/2) of RoPE's angles. Queries and keys of all layers ask for the
    same, which is kept; but what inference mode made no gradient may use."""
    position = torch.arange(start, start + T, device=device, dtype=dtype)
    wavelength = base ** (-torch.arange(0, D, 2, device=device, dtype=dtype) / D)
    angle = position[:, None] * wavelength
    return angle.cos(), angle.sin()


class Room:
    """Storage that the caches of one sequence share; `filled` tokens of it are written."""

    def __init__(self, k, v):
        self.k, self.v, self.filled = k, v, k.size(2)

    def begins_with(self, k, v):
        """Whether k and v are views of the first tokens here, which a caller may have selected or
        copied rows of, and whether this is a place that may be written to now."""
        writable = self.k.is_inference() == torch.is_inference_mode_enabled()
        return writable and same_rows(k, self.k) and same_rows(v, self.v)


def same_rows(a, b):
    """Whether a (B, G, S, D) is a view of the first tokens of all rows of b."""
    return a.data_ptr() == b.data_ptr() and a.stride() == b.stride() and a.size(0) == b.size(0)


class Cache(NamedTuple):
    """Keys and values (B, G, S, D) of the tokens so far: views into a Room that doubles when full.

    Appending costs O(1) a token. An older cache never changes: who appends to one that is not the
    newest gets a Room of their own, and so does everyone while gradients are recorded."""
    k: torch.Tensor
    v: torch.Tensor
    room: Any

    @staticmethod
    def append(cache, k, v):
        """The cache with k, v (B, G, T, D) behind it; `cache` may be None."""
        if cache is None:
            return Cache(k, v, Room(k, v))
        S, T, room = cache.k.size(2), k.size(2), cache.room
        if torch.is_grad_enabled():
            k = torch.cat([cache.k, k], dim=2)
            v = torch.cat([cache.v, v], dim=2)
            return Cache(k, v, Room(k, v))
        full = room.k.size(2) < S + T
        if full or room.filled != S or not room.begins_with(cache.k, cache.v):
            B, G, _, D = k.shape
            size = (B, G, 2 * (S + T), D)
            room = Room(k.new_empty(size), v.new_empty(size))
            room.k[:, :, :S] = cache.k
            room.v[:, :, :S] = cache.v
        room.k[:, :, S:S + T] = k
        room.v[:, :, S:S + T] = v
        room.filled = S + T
        return Cache(room.k[:, :, :S + T], room.v[:, :, :S + T], room)


def causal_attention(q, k, v):
    """Softmax attention of the last T tokens, q (B, H, T, D), over all S tokens, k and v
    (B, G, S, D) -> (B, H, T, D)."""
    T, S = q.size(2), k.size(2)
    k, v = repeat_heads(k, q.size(1)), repeat_heads(v, q.size(1))
    on_cpu = q.device.type == "cpu"
    if on_cpu and T == 1 and q.size(0) >= MANY_ROWS and torch.compiler.is_compiling():
        return attention_in_loops(q, k, v)
    if on_cpu and q.dtype in (torch.bfloat16, torch.float32) and T == S and 1 < T <= KEPT:
        return blocked_attention(q, k, v)
    if on_cpu and q.dtype == torch.bfloat16:
        # the fused kernel is fast, with few queries, and as exact in float32 only
        with torch.autocast("cpu", enabled=False):
            return causal_attention(q.float(), k.float(), v.float()).to(q.dtype)
    if on_cpu and T >= LONG:
        with fast_products():
            return fused_attention(q, k, v)
    return fused_attention(q, k, v)


def attention_in_loops(q, k, v):
    """The same of one token without a product: compiled it becomes loops that read a cache in
    bfloat16 as it is, where a product needs it as a new tensor in float32."""
    wide = torch.promote_types(q.dtype, torch.float32)
    scores = (q.to(wide) * k.to(wide)).sum(-1) * (1 / math.sqrt(q.size(-1)))  # (B, H, S)
    y = scores.softmax(-1)[..., None] * v.to(wide)
    return y.sum(2, keepdim=True).to(q.dtype)


def fused_attention(q, k, v):
    """The same by PyTorch's fused kernel, q, k, v (B, H, .., D)."""
    T, S = q.size(2), k.size(2)
    if T == S:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)
    if q.device.type == "cpu" and T >= MANY and FLASH and not torch.is_grad_enabled():
        return continued_attention(q, k, v)
    mask = None  # a single token sees all
    if T > 1:  # new token i is token S - T + i of the whole and sees everything up to itself
        mask = torch.ones(T, S, dtype=torch.bool, device=q.device).tril(S - T)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


def attention_scores(q, k):
    """q k^T / sqrt(D) of q (.., n, D) and k (.., m, D): (.., n, m), in at least float32.

    Rounded to bfloat16, a score of 20 would be wrong by up to 0.06, its weight by 6 %."""
    if torch.promote_types(q.dtype, k.dtype) == torch.bfloat16:
        scores = Scores.apply(q.flatten(0, -3), k.flatten(0, -3))
        return scores.view(*q.shape[:-1], k.size(-2))
    return q @ k.mT * (1 / math.sqrt(q.size(-1)))


class Scores(torch.autograd.Function):
    """Scores (X, n, m) in float32 of q (X, n, D) and k (X, m, D) in bfloat16. Their gradient is
    rounded to bfloat16 for the products behind it, as in attention's fused kernels."""

    @staticmethod
    def forward(ctx, q, k):
        ctx.save_for_backward(q, k)
        return exact_product(q.float(), k.float().mT, 1 / math.sqrt(q.size(-1)))

    @staticmethod
    @differentiable_once
    def backward(ctx, dS):
        q, k = ctx.saved_tensors
        dS = (dS / math.sqrt(q.size(-1))).to(q.dtype)
        return dS @ k, dS.mT @ q


def cache_bytes(sizes, tokens, dtype):
    """Keys and values of one sequence; sizes (H, G, D)."""
    _, G, D = sizes
    return 2 * G * D * tokens * dtype.itemsize


def causal_attention_flops(sizes, T):
    """Forward FLOPs per token of q k^T and of the weights times v, over T tokens; only what is
    visible counts. sizes (H, G, D)."""
    H, _, D = sizes
    return 2 * 2 * H * D * (T + 1) / 2


def into_blocks(t, size, n_before):
    """(B, H, T, D) -> (B, H, N, size, D): n_before empty places, then the T tokens, then empty
    places up to N * size."""
    T = t.size(2)
    N = math.ceil((n_before + T) / size)
    n_after = N * size - n_before - T
    return F.pad(t, (0, 0, n_before, n_after)).unflatten(2, (N, size))
