"""A GPT whose token mixer is an option: GPT-2's or LLaMA's skeleton around any entry of mixers.MIXERS.

    model = GPT(GPTConfig(vocab_size=65, mixer="causal_max"))
    logits, loss = model(idx, targets)          # training
    logits, state = model.step(idx, state)      # the same function a few tokens at a time

Shapes: B batch, T time, C channels (n_embd), H heads, D = C / H, V vocabulary, F hidden units of the FFN.
"""
import math
from dataclasses import fields
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F
from pydantic import Field

from base.command_line import one_line
from base.errors import BadInput
from base.loss import cross_entropy, head_loss
from base.options import checked
from config import ModelOptions, fill_in
from mixers import MIXERS, layer_mixers
from mixers.causal_reduction import causal_reduce, reduction_state_bytes


@checked
class GPTConfig(ModelOptions):
    """The model options of config.py, by keyword, and the size of the vocabulary.

    Options left at None take the architecture's own value. ValueError, naming the field, for a bad
    value or a bad combination."""
    vocab_size: int = Field(ge=1, lt=2**31)

    def __post_init__(self):
        fill_in(self)


def model_config(values, source):
    """The GPTConfig within `values` (dict); BadInput naming `source` if it does not hold together."""
    names = {f.name for f in fields(GPTConfig)}
    try:
        return GPTConfig(**{name: value for name, value in values.items() if name in names})
    except ValueError as error:
        own = isinstance(source, Path) and values.get("mixer_file")
        hint = f"; it was trained with --mixer_file={values['mixer_file']}: name that again" if own else ""
        raise BadInput(f"{source}: {one_line(error)}{hint}") from error


class Dropout(nn.Dropout):
    """nn.Dropout, with cheaper random numbers on a CPU, where it spends most of its time on them: four decisions from each
    64-bit number, so a share p is rounded to 1/65536."""

    def forward(self, x):
        if not self.training or self.p == 0 or x.device.type != "cpu" or torch.compiler.is_compiling():
            return super().forward(x)
        bits = torch.empty(math.ceil(x.numel() / 4), dtype=torch.int64).random_(-2**63, None).view(torch.int16)[:x.numel()]
        dropped = min(round(self.p * 2**16), 2**16 - 1)
        keep = (bits >= dropped - 2**15).to(x.dtype).view(x.shape)
        return x * (keep * (2**16 / (2**16 - dropped)))


class MLP(nn.Module):
    """The FFN: down(act(up(x))), or with llama down(act(gate(x)) * up(x)). x (B, T, C) -> (B, T, C), and the state of a
    causal reduction that stands in for the activation (None otherwise)."""

    def __init__(self, config):
        super().__init__()
        self.gated = config.arch == "llama"
        self.activation = config.mlp_activation
        # gate and up in one product, in this order
        self.c_fc = nn.Linear(config.n_embd, config.ffn_hidden * (2 if self.gated else 1), bias=config.ffn_bias)
        self.c_proj = nn.Linear(config.ffn_hidden, config.n_embd, bias=config.ffn_bias)

    def forward(self, x, state=None):
        a, up = self.c_fc(x).chunk(2, dim=-1) if self.gated else (self.c_fc(x), None)
        if self.activation == "gelu":
            a = F.gelu(a)
        elif self.activation == "gelu_tanh":
            a = F.gelu(a, approximate="tanh")
        elif self.activation == "silu":
            a = F.silu(a)
        else:
            _, op, *context = self.activation.split("_")
            a, state = causal_reduce(a, op, bool(context), state)
        return self.c_proj(a * up if self.gated else a), state

    def state_bytes(self, dtype):
        reduces = self.activation.startswith("causal")
        return reduction_state_bytes(self.c_proj.in_features, self.activation.endswith("context"), dtype) if reduces else 0


class Block(nn.Module):
    """h + mixer(norm(h)), then h + FFN(norm(h)); without a mixer (pelican) only the second. State: the mixer's, the FFN's."""

    def __init__(self, config, layer):
        super().__init__()
        builder = MIXERS[layer_mixers(config.mixer, config.n_layer)[layer]]
        self.norm1 = make_norm(config) if builder else None
        self.mixer = builder(config, layer) if builder else None
        self.norm2 = make_norm(config)
        self.mlp = MLP(config)
        self.drop = Dropout(config.dropout)

    def forward(self, h, state=(None, None)):
        mixer_state, mlp_state = state
        if self.mixer is not None:
            y, mixer_state = self.mixer(self.norm1(h), mixer_state)
            h = h + self.drop(y)
        y, mlp_state = self.mlp(self.norm2(h), mlp_state)
        return h + self.drop(y), (mixer_state, mlp_state)


def make_norm(config):
    if config.arch == "llama":
        return nn.RMSNorm(config.n_embd, eps=config.norm_eps)
    return nn.LayerNorm(config.n_embd, eps=config.norm_eps, bias=config.bias)


class State(NamedTuple):
    """What `step` carries from token to token. It never changes: feeding it again gives the same result again."""
    n: int  # tokens so far
    blocks: tuple[Any, ...]  # (mixer's state, FFN's state) of each block


class GPT(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.config = config
        V, C, r = config.vocab_size, config.n_embd, config.embed_rank
        self.embed = nn.Sequential(nn.Embedding(V, r), nn.Linear(r, C, bias=False)) if r else nn.Embedding(V, C)
        self.pos_embed = nn.Embedding(config.block_size, C) if config.pos == "learned" else None
        self.drop = Dropout(config.dropout)
        self.blocks = nn.ModuleList(Block(config, layer) for layer in range(config.n_layer))
        self.norm = make_norm(config)
        self.head = nn.Linear(C, V, bias=False)
        self.init_weights()
        if config.tie_head:
            self.head.weight = self.embed.weight

    def init_weights(self):
        """GPT-2's: everything from N(0, init_std^2), biases zero, and the last projection of each sub-layer scaled down by
        the square root of their number, so that the residual stream keeps its size over depth."""
        std = self.config.init_std
        residual_std = std / math.sqrt(2 * self.config.n_layer)
        for name, module in self.named_modules():
            if isinstance(module, (nn.Linear, nn.Embedding)):
                nn.init.normal_(module.weight, std=residual_std if name.endswith("c_proj") else std)
            if isinstance(module, nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)
        if self.config.embed_rank:  # the product of the two then starts at init_std as a plain embedding does
            nn.init.normal_(self.embed[1].weight, std=self.config.embed_rank ** -0.5)
        if self.config.zero_init_head:
            nn.init.zeros_(self.head.weight)

    def hidden(self, idx, state=None):
        """What the head reads: (B, T, C) for tokens idx (B, T) on top of `state`; and the new state."""
        n, blocks = state or (0, [(None, None)] * self.config.n_layer)
        T = idx.size(1)
        if T == 0:
            raise ValueError("no tokens: idx must be (B, T) with T >= 1")
        h = self.embed(idx).to(self.norm.weight.dtype)  # in bfloat16 the low-rank embedding's product would make all of h so
        if self.pos_embed is not None:
            if n + T > self.config.block_size:
                raise ValueError(f"{n + T} tokens, but the model has learned positions for block_size {self.config.block_size} only")
            h = h + self.pos_embed.weight[n:n + T]
        h = self.drop(h)
        new = []
        for block, block_state in zip(self.blocks, blocks):
            h, block_state = block(h, block_state)
            new.append(block_state)
        return self.norm(h) / self.config.head_temperature, State(n + T, tuple(new))

    def forward(self, idx, targets=None):
        """logits (B, T, V) of idx (B, T), and the mean cross-entropy in nats over targets (B, T) != -1, or None."""
        logits = self.head(self.hidden(idx)[0])
        return logits, None if targets is None else cross_entropy(logits.flatten(0, 1), targets)

    def loss(self, idx, targets):
        """The loss alone, in nats per target; what training uses. Many logits are never all there at once."""
        return head_loss(self.hidden(idx)[0], self.head, targets)

    def step(self, idx, state=None):
        """Feeds idx (B, T), T >= 1, on top of `state` (None: the start). Returns logits (B, T, V) and the new state.

        A sequence fed in any split gives the logits of one call on the whole. ValueError past block_size with learned
        positions; with RoPE or none it goes on."""
        h, state = self.hidden(idx, state)
        return self.head(h), state

    @torch.no_grad()
    def stream(self, idx, max_new_tokens, temperature=1.0, top_k=None, generator=None):
        """Samples token after token behind idx (B, T), yielding each as (B, 1). Temperature 0 takes the likeliest.

        Each token costs one `step`. Learned positions end at block_size: then the last half block is read anew."""
        limit = self.config.block_size if self.config.pos == "learned" else math.inf
        tokens, new, state = idx, idx if idx.size(1) <= limit else idx[:, -limit:], None
        for _ in range(max_new_tokens):
            if state is not None and state.n + 1 > limit:
                tokens = tokens[:, -max(limit // 2, 1):]
                new, state = tokens, None
            logits, state = self.step(new, state)
            new = sample(logits[:, -1], temperature, top_k, generator)
            if limit != math.inf:
                tokens = torch.cat([tokens, new], dim=1)
            yield new

    def generate(self, idx, max_new_tokens, temperature=1.0, top_k=None, generator=None):
        """idx (B, T) with max_new_tokens sampled tokens behind it (B, T + max_new_tokens); see `stream`."""
        return torch.cat([idx, *self.stream(idx, max_new_tokens, temperature, top_k, generator)], dim=1)

    def apply_statistics(self):
        """Tells the mixers that an optimiser step is done; training calls it once per step."""
        for block in self.blocks:
            if hasattr(block.mixer, "apply_statistics"):
                block.mixer.apply_statistics()

    def flops_per_token(self, T):
        """Forward FLOPs per token over a sequence of T tokens, by each mixer's own formula (see mixers/__init__.py); None
        if a mixer has none. A training step takes three times as many."""
        products = [m.weight.numel() for block in self.blocks for m in (block.mlp.c_fc, block.mlp.c_proj)]
        products += [self.head.weight.numel(), self.embed[1].weight.numel() if self.config.embed_rank else 0]
        mixers = [block.mixer for block in self.blocks if block.mixer is not None]
        if not all(hasattr(mixer, "flops_per_token") for mixer in mixers):
            return None
        return 2 * sum(products) + sum(mixer.flops_per_token(T) for mixer in mixers)

    def state_bytes(self, T, dtype):
        """Bytes of one sequence's state after T tokens; None if a mixer does not say."""
        mixers = [block.mixer for block in self.blocks if block.mixer is not None]
        if not all(hasattr(mixer, "state_bytes") for mixer in mixers):
            return None
        return sum(mixer.state_bytes(T, dtype) for mixer in mixers) + sum(block.mlp.state_bytes(dtype) for block in self.blocks)

    def parameter_groups(self):
        """Number of parameters by group; a tied head counts as embedding. The groups add up to all of them."""
        groups = dict.fromkeys(["embedding", "mixer", "mlp", "norms", "head"], 0)
        for name, p in self.named_parameters():
            part = next((part for part in name.split(".") if part in ("mixer", "mlp", "head")), None)
            groups[part or ("embedding" if "embed" in name else "norms")] += p.numel()
        return groups


def sample(logits, temperature, top_k, generator):
    """One token (B, 1) from logits (B, V). ValueError for a negative temperature or a top_k below 1."""
    if temperature < 0 or top_k is not None and top_k < 1:
        raise ValueError(f"temperature {temperature} must be at least 0, and top_k {top_k} at least 1 or None")
    if temperature == 0:
        return logits.argmax(dim=-1, keepdim=True)
    logits = logits.float()
    logits = (logits - logits.amax(-1, keepdim=True)) / max(temperature, 1e-30)  # float32 knows nothing smaller to divide by
    if top_k is not None:
        logits = logits.masked_fill(logits < logits.topk(min(top_k, logits.size(-1))).values[:, -1:], -math.inf)
    return torch.multinomial(logits.softmax(-1), 1, generator=generator)
