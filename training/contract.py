"""Is a mixer what mixers/__init__.py asks for? If not, BadInput names the place in the user's file.

B batch, T time, C channels.
"""
import inspect

import torch
import torch.nn as nn

from base.errors import BadInput
from base.user_code import definition
from mixers import MIXERS, layer_mixers


def check_builders(mixer):
    """BadInput if a builder cannot be called as builder(config, layer)."""
    for name in layer_mixers(mixer):
        builder = MIXERS[name]
        if builder is None:
            continue
        try:
            inspect.signature(builder).bind("config", "layer")
        except TypeError as error:
            code = builder.__init__ if isinstance(builder, type) else builder
            raise BadInput(f"mixer {name}: its builder must take (config, layer): {error} "
                           f"({definition(code)})") from error


def check_forward(model, dtype=torch.float64):
    """BadInput, with the place in the user's file, unless each mixer of a GPT on the CPU is what
    mixers/__init__.py asks for: an nn.Module with forward(x, state=None) -> (y, state), y shaped
    like x. What a mixer raises passes through; only with a state it may raise, since a mixer that
    cannot decode may train."""
    names = layer_mixers(model.config.mixer, model.config.n_layer)
    for name, block in zip(names, model.blocks):
        mixer = block.mixer
        if MIXERS[name] is None:
            continue
        if not isinstance(mixer, nn.Module):
            raise BadInput(f"mixer {name}: its builder must return an nn.Module, "
                           f"not {kind_of(mixer)}")
        where = definition(type(mixer).forward)
        check_signature(name, mixer, where)
        generator = torch.Generator().manual_seed(0)
        x = torch.randn(2, 5, model.config.n_embd, generator=generator).to(dtype)
        with torch.no_grad():
            returned = mixer(x.clone())
            check_returned(name, x, returned, where)
            try:
                returned = mixer(x.clone(), returned[1])
            except Exception:
                continue
            check_returned(name, x, returned, where)


def check_signature(name, mixer, where):
    signature = inspect.signature(mixer.forward)
    try:
        signature.bind("x")
        signature.bind("x", "state")
    except TypeError as error:
        raise BadInput(f"mixer {name}: forward must be forward(self, x, state=None), "
                       f"and takes {signature} ({where})") from error


def check_returned(name, x, returned, where):
    """BadInput unless what forward returned for x (B, T, C) is (y, state), y a tensor that can be
    added to x."""
    wrong = None
    if not isinstance(returned, (tuple, list)) or len(returned) != 2:
        wrong = f"it returned {kind_of(returned)}"
    elif not isinstance(returned[0], torch.Tensor) or returned[0].shape != x.shape:
        wrong = f"y is {kind_of(returned[0])}"
    elif torch.promote_types(returned[0].dtype, x.dtype) != x.dtype:
        wrong = f"x is {x.dtype}, y {returned[0].dtype}: cast it, y.to(x.dtype)"
    if wrong:
        raise BadInput(f"mixer {name}: forward must return (y, state), y shaped like x; "
                       f"for x {tuple(x.shape)} {wrong} ({where})")


def kind_of(value):
    """"a tensor (2, 5, 32)", "3 values", "None", "a dict"."""
    if isinstance(value, torch.Tensor):
        return f"a tensor {tuple(value.shape)}"
    if isinstance(value, (tuple, list)):
        return f"{len(value)} values"
    return "None" if value is None else f"a {type(value).__name__}"
