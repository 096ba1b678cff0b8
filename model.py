"""A GPT whose token mixer is an option: GPT-2's or LLaMA's skeleton around any entry of
mixers.MIXERS.

    model = GPT(GPTConfig(vocab_size=65, mixer="causal_max"))
    logits, loss = model(idx, targets)          # training
    logits, state = model.step(idx, state)      # the same function a few tokens at a time

Shapes: B batch, T time, C channels (n_embd), V vocabulary, r embed_rank, F hidden units of the FFN.
"""
import math
from dataclasses import fields
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F
from pydantic import Field
from torch.utils.checkpoint import checkpoint

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
    """The GPTConfig within `values`, option name -> value, of which others are left out.

    source: the file they come from (a Path), or words that name it. BadInput, naming it, if they do
    not hold together."""
    names = {f.name for f in fields(GPTConfig)}
    own = {name: value for name, value in values.items() if name in names}
    try:
        return GPTConfig(**own)
    except ValueError as error:
        message = f"{source}: {one_line(error)}"
        mixer_file = values.get("mixer_file")
        if isinstance(source, Path) and mixer_file:
            message += f"; it was trained with --mixer_file={mixer_file}: name that again"
        raise BadInput(message) from error


class Dropout(nn.Dropout):
    """nn.Dropout, with cheaper random numbers on a CPU, where it spends most of its time on them:
    four decisions from each 64-bit number, so a share p is rounded to 1/65536."""

    def forward(self, x):
        if not self.training or self.p == 0:
            return x
        if x.device.type != "cpu" or torch.compiler.is_compiling():
            return super().forward(x)
        numbers = torch.empty(math.ceil(x.numel() / 4), dtype=torch.int64).random_(-2**63, None)
        bits = numbers.view(torch.int16)[:x.numel()]  # from -2^15 to 2^15 - 1
        dropped = min(round(self.p * 2**16), 2**16 - 1)  # of 2^16 values
        keep = (bits >= dropped - 2**15).to(x.dtype).view(x.shape)
        return x * (keep * (2**16 / (2**16 - dropped)))


class MLP(nn.Module):
    """The FFN: c_proj(act(c_fc(x))), or with llama c_proj(act(gate(x)) * up(x)). x (B, T, C) ->
    (B, T, C), and the state of a causal reduction that stands in for the activation (None
    otherwise)."""

    def __init__(self, config):
        super().__init__()
        self.gated = config.arch == "llama"
        self.activation = config.mlp_activation
        C, hidden = config.n_embd, config.ffn_hidden
        # gate and up in one product, in this order
        self.c_fc = nn.Linear(C, 2 * hidden if self.gated else hidden, bias=config.ffn_bias)
        self.c_proj = nn.Linear(hidden, C, bias=config.ffn_bias)

    def forward(self, x, state=None):
        h = self.c_fc(x)  # (B, T, F), or gate and up (B, T, 2 F)
        if not self.gated:
            h, state = self.activate(h, state)
            return self.c_proj(h), state
        gate, up = h.chunk(2, dim=-1)
        gate, state = self.activate(gate, state)
        return self.c_proj(gate * up), state

    def activate(self, h, state):
        """The activation of h (B, T, F), and the state."""
        if self.activation == "gelu":
            return F.gelu(h), state
        if self.activation == "gelu_tanh":
            return F.gelu(h, approximate="tanh"), state
        if self.activation == "silu":
            return F.silu(h), state
        if self.activation == "relu":
            return F.relu(h), state
        if self.activation == "leaky_relu":
            return F.leaky_relu(h, 0.1), state
        op = self.activation.split("_")[1]  # causal_max, causal_max_context, ..
        return causal_reduce(h, op, self.activation.endswith("_context"), state)

    def state_bytes(self, dtype):
        if not self.activation.startswith("causal_"):
            return 0
        with_context = self.activation.endswith("_context")
        return reduction_state_bytes(self.c_proj.in_features, with_context, dtype)


class Block(nn.Module):
    """h + mixer(norm(h)), then h + FFN(norm(h)); without a mixer (pelican) only the second. State:
    the mixer's, the FFN's."""

    def __init__(self, config, layer):
        super().__init__()
        name = layer_mixers(config.mixer, config.n_layer)[layer]
        builder = MIXERS[name]
        self.norm1 = self.mixer = None
        if builder is not None:
            self.norm1 = make_norm(config, config.norm)
            self.mixer = builder(config, layer)
        self.norm2 = make_norm(config, config.norm)
        self.mlp = MLP(config)
        self.drop = Dropout(config.dropout)

    def forward(self, h, state=(None, None)):
        mixer_state, mlp_state = state
        if self.mixer is not None:
            y, mixer_state = self.mixer(self.norm1(h), mixer_state)
            h = h + self.drop(y)
        y, mlp_state = self.mlp(self.norm2(h), mlp_state)
        return h + self.drop(y), (mixer_state, mlp_state)


def without_state(block, h):
    """A block's output alone, so that nothing holds on to its activations by the state."""
    return block(h)[0]


def make_norm(config, kind):
    if kind == "none":
        return nn.Identity()
    if kind == "rms":
        return nn.RMSNorm(config.n_embd, eps=config.norm_eps)
    return nn.LayerNorm(config.n_embd, eps=config.norm_eps, bias=config.bias)


class State(NamedTuple):
    """What `step` carries from token to token. It never changes: feeding it again gives the same
    result again."""
    n: int  # tokens so far
    blocks: tuple[Any, ...]  # (mixer's state, FFN's state) of each block


class GPT(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.config = config
        self.checkpoint_activations = False  # in `loss`: see the option
        V, C, r = config.vocab_size, config.n_embd, config.embed_rank
        if r:
            self.embed = nn.Sequential(nn.Embedding(V, r), nn.Linear(r, C, bias=False))
        else:
            self.embed = nn.Embedding(V, C)
        self.pos_embed = nn.Embedding(config.block_size, C) if config.pos == "learned" else None
        self.drop = Dropout(config.dropout)
        self.blocks = nn.ModuleList(Block(config, layer) for layer in range(config.n_layer))
        # without norms in the blocks (Jha and Reagen 2024, arXiv 2410.09637) the last one stays
        last = "rms" if config.arch == "llama" else "layer"
        self.norm = make_norm(config, last if config.norm == "none" else config.norm)
        self.head = nn.Linear(C, V, bias=False)
        self.init_weights()
        if config.tie_head:
            self.head.weight = self.embed.weight

    def init_weights(self):
        """GPT-2's: everything from N(0, init_std^2), biases zero, and the last projection of each
        sub-layer scaled down by the square root of their number, so that the residual stream keeps
        its size over depth."""
        std = self.config.init_std
        residual_std = std / math.sqrt(2 * self.config.n_layer)
        for name, module in self.named_modules():
            if isinstance(module, (nn.Linear, nn.Embedding)):
                last = name.endswith("c_proj")
                nn.init.normal_(module.weight, std=residual_std if last else std)
            if isinstance(module, nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)
        if self.config.embed_rank:
            # the product of the two then starts at init_std, as a plain embedding does
            nn.init.normal_(self.embed[1].weight, std=self.config.embed_rank ** -0.5)
        if self.config.zero_init_head:
            nn.init.zeros_(self.head.weight)

    def hidden(self, idx, state=None, checkpointed=False):
        """What the head reads, (B, T, C), for tokens idx (B, T) on top of `state`; and the new
        state, whose blocks have none if their activations are checkpointed."""
        config = self.config
        n, old_states = state or (0, [(None, None)] * config.n_layer)
        T = idx.size(1)
        if T == 0:
            raise ValueError("no tokens: idx must be (B, T) with T >= 1")
        h = self.embed(idx)
        h = h.to(self.norm.weight.dtype)  # autocast gives a low-rank embedding's product bfloat16
        if self.pos_embed is not None:
            if n + T > config.block_size:
                raise ValueError(f"{n + T} tokens, but the model has learned positions for "
                                 f"block_size {config.block_size} only")
            h = h + self.pos_embed.weight[n:n + T]
        h = self.drop(h)
        new_states = []
        for block, old in zip(self.blocks, old_states):
            if checkpointed:
                h, new = checkpoint(without_state, block, h, use_reentrant=False), None
            else:
                h, new = block(h, old)
            new_states.append(new)
        return self.norm(h) / config.head_temperature, State(n + T, tuple(new_states))

    def forward(self, idx, targets=None):
        """logits (B, T, V) of idx (B, T), and the mean cross-entropy in nats over targets (B, T) !=
        -1, or None without targets."""
        h, _ = self.hidden(idx)
        logits = self.head(h)
        if targets is None:
            return logits, None
        return logits, cross_entropy(logits.flatten(0, 1), targets)

    def loss(self, idx, targets):
        """The loss alone, in nats per target; what training uses. Many logits are never all there
        at once."""
        h, _ = self.hidden(idx, checkpointed=self.checkpoint_activations and self.training)
        return head_loss(h, self.head, targets)

    def step(self, idx, state=None):
        """Feeds idx (B, T), T >= 1, on top of `state` (None: the start). Returns logits (B, T, V)
        and the new state.

        A sequence fed in any split gives the logits of one call on the whole. ValueError past
        block_size with learned positions; with RoPE or none it goes on."""
        h, state = self.hidden(idx, state)
        return self.head(h), state

    @torch.no_grad()
    def stream(self, idx, max_new_tokens, temperature=1.0, top_k=None, generator=None,
               one_token=None):
        """Samples token after token behind idx (B, T), yielding each as (B, 1). Temperature 0 takes
        the likeliest.

        Each token costs one `step`. Learned positions end at block_size: then the last half block
        is read anew. one_token: `step` of one token by other means (training/compiled.py)."""
        limit = self.config.block_size if self.config.pos == "learned" else None
        recent = idx  # what may be read anew
        new = idx if limit is None else idx[:, -limit:]
        state = None
        for _ in range(max_new_tokens):
            if limit is not None and state is not None and state.n + 1 > limit:
                recent = recent[:, -max(limit // 2, 1):]
                new, state = recent, None
            if one_token is not None and state is not None:
                logits, state = one_token(new, state)
            else:
                h, state = self.hidden(new, state)
                logits = self.head(h[:, -1:])  # of a prompt the last alone: all may be gigabytes
            new = sample(logits[:, -1], temperature, top_k, generator)
            if limit is not None:
                recent = torch.cat([recent, new], dim=1)
            yield new

    def generate(self, idx, max_new_tokens, temperature=1.0, top_k=None, generator=None):
        """idx (B, T) with max_new_tokens sampled tokens behind it (B, T + max_new_tokens); see
        `stream`."""
        new = self.stream(idx, max_new_tokens, temperature, top_k, generator)
        return torch.cat([idx, *new], dim=1)

    def mixers(self):
        """The mixers, layer by layer; without those blocks that have none."""
        return [block.mixer for block in self.blocks if block.mixer is not None]

    def apply_statistics(self):
        """Tells the mixers that an optimiser step is done; training calls it once per step."""
        for mixer in self.mixers():
            if hasattr(mixer, "apply_statistics"):
                mixer.apply_statistics()

    def flops_per_token(self, T):
        """Forward FLOPs per token over a sequence of T tokens, by each mixer's own formula (see
        mixers/__init__.py); None if a mixer has none. A training step takes three times as many."""
        mixers = self.mixers()
        if not all(hasattr(mixer, "flops_per_token") for mixer in mixers):
            return None
        weights = self.head.weight.numel()
        if self.config.embed_rank:
            weights += self.embed[1].weight.numel()
        for block in self.blocks:
            weights += block.mlp.c_fc.weight.numel() + block.mlp.c_proj.weight.numel()
        return 2 * weights + sum(mixer.flops_per_token(T) for mixer in mixers)

    def state_bytes(self, T, dtype):
        """Bytes of one sequence's state, the largest up to T tokens, where the heavy operations are
        of that torch.dtype; None if a mixer does not say."""
        mixers = self.mixers()
        if not all(hasattr(mixer, "state_bytes") for mixer in mixers):
            return None
        of_mixers = sum(mixer.state_bytes(T, dtype) for mixer in mixers)
        of_mlps = sum(block.mlp.state_bytes(dtype) for block in self.blocks)
        return of_mixers + of_mlps

    def parameter_groups(self):
        """Number of parameters by group; a tied head counts as embedding. The groups add up to all
        of them."""
        groups = dict(embedding=0, mixer=0, mlp=0, norms=0, head=0)
        for name, p in self.named_parameters():  # blocks.0.mixer.c_proj.weight, head.weight, ..
            parts = name.split(".")
            if parts[0] == "blocks" and parts[2] in ("mixer", "mlp"):
                group = parts[2]
            elif parts[0] == "head":
                group = "head"
            elif "embed" in parts[0]:
                group = "embedding"
            else:
                group = "norms"
            groups[group] += p.numel()
        return groups


def sample(logits, temperature, top_k, generator):
    """One token (B, 1) from logits (B, V). ValueError for a negative temperature or a top_k below
    1."""
    if temperature < 0:
        raise ValueError(f"temperature {temperature} must be at least 0")
    if top_k is not None and top_k < 1:
        raise ValueError(f"top_k {top_k} must be at least 1, or None")
    if temperature == 0:
        return logits.argmax(dim=-1, keepdim=True)
    logits = logits.float()
    # float32 has nothing smaller than 1e-30 to divide by
    logits = (logits - logits.amax(-1, keepdim=True)) / max(temperature, 1e-30)
    if top_k is not None:
        kept = logits.topk(min(top_k, logits.size(-1))).values
        logits = logits.masked_fill(logits < kept[:, -1:], -math.inf)
    return torch.multinomial(logits.softmax(-1), 1, generator=generator)
