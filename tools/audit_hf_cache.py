"""Questions about a cache and padding, of a causal language model of transformers.

Each takes a Subject of tools/audit_tokens.py whose module is the model; used by tools/audit_hf.py.
"""
import inspect

import torch

from tools.audit_answers import Answer, judged
from training.leaks import difference

CACHES = ("cache", "past_key_values", "cache_params", "state", "mems", "past_buckets_states")
FILLED = ("recurrent_gemma",)  # they fill a cache that is given, and return none
PIECES = ([33, 7, 1, 12, 37], [5, 85], [64, 26], [2] * 45)


class Misshapen(ValueError):
    """Logits that are not one a token."""


def shaped(y, idx):
    if y.shape[:2] != idx.shape:
        raise Misshapen(f"for tokens {tuple(idx.shape)} logits are {tuple(y.shape)}")
    return y


def step(model, piece, kept, start=None):
    """(logits, what to give the next step) of tokens on top of a cache; kept {}: at the beginning.
    start: the first position, to be told as generate() tells it."""
    from transformers import DynamicCache
    more = dict(kept)
    if not kept and model.config.model_type in FILLED:
        more["cache"] = DynamicCache(config=model.config)
    if start is not None:
        more["position_ids"] = torch.arange(start, start + piece.size(1))[None]
    out = model(input_ids=piece, use_cache=True, **more)
    for name in CACHES:
        if getattr(out, name, None) is not None:
            return shaped(out.logits, piece), {name: getattr(out, name)}
    if model.config.model_type in FILLED:
        return shaped(out.logits, piece), {"cache": more["cache"]}
    raise NoCache


class NoCache(Exception):
    """A model returns none."""


def cached(model, idx, sizes, positions=False):
    """Logits (B, T, V) of the tokens in pieces of the sizes, each on top of the cache before."""
    parts, kept, start = [], {}, 0
    for piece in idx.split(sizes, dim=1):
        y, kept = step(model, piece, kept, start if positions else None)
        parts.append(y)
        start += piece.size(1)
    return torch.cat(parts, dim=1)


def with_cache(question, splits):
    """The question's function: whether pieces of these sizes are the whole."""
    def ask(subject):
        model = subject.module
        worst = 0.0
        most = subject.limit("length")
        for sizes in splits:
            idx = subject.tokens(2, sum(sizes))
            try:
                y = subject.of(lambda x: cached(model, x, sizes), idx)
            except NoCache:
                return Answer(question, None, "it returns no cache", word="no cache")
            moved = difference(y, subject(idx))
            worst = max(worst, moved.max().item())
            if not worst <= most:
                where = {"pieces": shown(sizes), "moved": first_over(moved, most)}
                answer = judged(question, worst, most, smallest_pieces(subject, most) or where)
                if takes(model, "position_ids"):
                    y = subject.of(lambda x: cached(model, x, sizes, True), idx)
                    if difference(y, subject(idx)).max() <= most:
                        answer.figures += "; right with position_ids, as generate() gives them"
                return answer
        return judged(question, worst, most)
    return ask


def apart(subject):
    """Two sequences, step by step in turn, each with a cache of its own."""
    most = subject.limit("length")
    T = 12
    both = subject.tokens(2, T)

    def in_turn(idx):
        kept, parts = [{}, {}], [[], []]
        for t in range(T):
            for row in range(2):
                y, kept[row] = step(subject.module, idx[row:row + 1, t:t + 1], kept[row])
                parts[row].append(y)
        return torch.cat([torch.cat(rows, dim=1) for rows in parts])

    def one_by_one(idx):
        rows = [cached(subject.module, idx[row:row + 1], [1] * T) for row in range(2)]
        return torch.cat(rows)

    try:
        moved = difference(subject.of(in_turn, both), subject.of(one_by_one, both))
    except NoCache:
        return Answer("apart", None, "it returns no cache", word="no cache")
    size = moved.max().item()
    where = None if size <= most else {"tokens": T, "moved": first_over(moved, most)}
    return judged("apart", size, most, where)


def takes(model, name):
    return name in inspect.signature(model.forward).parameters


def first_over(moved, most):
    """The first position at which a row moves more than it may."""
    return (~(moved <= most)).any(0).nonzero()[0].item()


def shown(sizes):
    return "+".join(map(str, sizes)) if len(sizes) <= 6 else f"{sizes[0]}+{sizes[1]}+..."


def smallest_pieces(subject, most):
    """The smallest beginning and piece behind it that fail, or None."""
    for T in (2, 3, 4, 6, 9, 12, 17, 24, 33, 48, 65, 80):
        for last in sorted({1, 2, 3, T // 2, T - 1}):
            if not 0 < last < T:
                continue
            idx = subject.tokens(2, T)
            y = subject.of(lambda x: cached(subject.module, x, [T - last, last]), idx)
            moved = difference(y, subject(idx))
            if not moved.max() <= most:
                return {"pieces": f"{T - last}+{last}", "moved": first_over(moved, most)}
    return None


def padding(subject):
    model = subject.module
    if not takes(model, "attention_mask"):
        return Answer("padding", None, "its forward takes no attention_mask", word="no mask")
    most = subject.limit("length")
    worst = 0.0
    for T, pad in ((3, 1), (12, 5), (40, 23)):
        idx = subject.tokens(2, T)
        padded = torch.cat([torch.full((2, pad), pad_token(model)), idx], dim=1)
        padded[0] = subject.tokens(1, T + pad, seed=3)[0]  # a neighbour without padding
        mask = torch.ones_like(padded)
        mask[1, :pad] = 0
        y = subject.of(lambda x: masked(model, x, mask), padded)[1:, pad:]
        alone = subject.of(lambda x: masked(model, x, torch.ones_like(x)), idx)[1:]
        moved = difference(y, alone)
        worst = max(worst, moved.max().item())
        if not worst <= most:
            where = {"padding": pad, "tokens": T, "moved": first_over(moved, most)}
            return judged("padding", worst, most, where)
    return judged("padding", worst, most)


def masked(model, idx, mask):
    """Logits with a mask, and with positions as generate() makes them."""
    more = {}
    if takes(model, "position_ids"):
        more["position_ids"] = (mask.cumsum(1) - 1).clamp(min=0)
    return shaped(model(input_ids=idx, attention_mask=mask, **more).logits, idx)


def pad_token(model):
    token = getattr(model.config.get_text_config(), "pad_token_id", None)
    return 0 if token is None else token
