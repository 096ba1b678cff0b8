"""The registry: every token mixer that `--mixer` can name.

A mixer is an nn.Module whose `forward(x, state=None) -> (y, state)` takes x (B, T, C), the normalised hidden states of
T new tokens on top of `state` (None: the start of the sequence), and returns y (B, T, C), where y_t depends on the
tokens up to t only. Training, prefill and decoding are this one function: feeding a sequence in any split gives the
outputs of one call on the whole. A returned state never changes later; it is a (nested) tuple of tensors and numbers
(a key/value cache also holds on to the storage it is a view of).

It may also say what it costs, and ask to be told of each optimiser step:

    flops_per_token(T)      forward FLOPs per token, on average over a sequence of T tokens; matrix products only, a
                            multiply-add is 2, and of a product with a causal mask only the visible half counts
    state_bytes(T, dtype)   bytes of one sequence's state after T tokens, when activations are of that torch.dtype
    apply_statistics()      called once per optimiser step: the forward pass may collect statistics, never apply them

A mixer whose q, k and v come from a QKV (mixers/parts/heads.py) named c_attn, and whose heads end in a c_proj, shows its attention matrix
in tools/inspect_attention.py without further code.

To add one: write mixers/mine.py, import its class here and add a line to MIXERS. Tests, benchmark and audit take it from there.
Without touching this folder: a file of your own with `from mixers import MIXERS; MIXERS["mine"] = Mine`, and --mixer_file=PATH.
"""
import runpy
from functools import partial
from pathlib import Path

from base.errors import BadInput
from base.files import is_file
from mixers.causal_reduction import CausalReduction
from mixers.deltanet import DeltaNet
from mixers.gated_deltanet import GatedDeltaNet
from mixers.gla import GLA
from mixers.kda import KDA
from mixers.linear import Linear
from mixers.linformer import Linformer
from mixers.lln import LLN
from mixers.lln_diag import LLNDiag
from mixers.mamba2 import Mamba2
from mixers.pelican import Pelican
from mixers.performer import Performer
from mixers.retnet import RetNet
from mixers.softmax import Softmax
from mixers.ssa import SSA
from mixers.swa import SWA

# name -> builder(config, layer) -> nn.Module, or None: the block has no mixer and no norm before it
MIXERS = {
    "softmax": Softmax,
    "pelican": Pelican,
    "causal_max": partial(CausalReduction, op="max"),
    "causal_min": partial(CausalReduction, op="min"),
    "causal_mean": partial(CausalReduction, op="mean"),
    "causal_max_context": partial(CausalReduction, op="max", context=True),
    "causal_min_context": partial(CausalReduction, op="min", context=True),
    "causal_mean_context": partial(CausalReduction, op="mean", context=True),
    "lln": LLN,
    "lln_diag": LLNDiag,
    "ssa": SSA,
    "linear": Linear,
    "performer": Performer,
    "linformer": Linformer,
    "swa": SWA,
    "gla": GLA,
    "retnet": RetNet,
    "mamba2": Mamba2,
    "deltanet": DeltaNet,
    "gated_deltanet": GatedDeltaNet,
    "kda": KDA,
}
loaded = set()  # files that have registered theirs


def mechanism_of(option):
    """The mechanism that an option is named after, "lln" for "lln_matching", or None."""
    return next((name for name in ("lln_diag", "lln", "ssa", "performer", "linformer") if option.startswith(name + "_")), None)


def layer_mixers(mixer, n_layer=None):
    """The mixer's name for each layer. mixer: a name, or a pattern `softmax,lln,lln` (also joined by +), layer i taking
    entry i modulo its length; without n_layer, the pattern itself. ValueError with the choices for an unknown name."""
    pattern = [name.strip() for name in mixer.replace("+", ",").split(",")]
    for name in pattern:
        if name not in MIXERS:
            raise ValueError(f"mixer {name!r}; have {', '.join(sorted(MIXERS))}")
    return [pattern[i % len(pattern)] for i in range(n_layer or len(pattern))]


def mixer_names(text):
    """The entries of a list of mixers, each a name or a pattern joined by +; "all" is every one. BadInput with the choices."""
    if text == "all":
        return list(MIXERS)
    try:
        return list(dict.fromkeys("+".join(layer_mixers(name)) for name in text.split(",")))
    except ValueError as error:
        raise BadInput(f"--mixers={text}: {error}") from error


def has_effect(option, mixer, n_layer):
    """Whether an option matters to a model: not if it is named after a mechanism that none of its layers has."""
    mechanism = mechanism_of(option)
    return mechanism is None or any(name.startswith(mechanism) for name in layer_mixers(mixer, n_layer))


def load_mixer_file(path):
    """Runs a user's file, which registers its mixer in MIXERS. BadInput if it does not run or registers none."""
    if not is_file(path):
        raise BadInput(f"mixer_file {path} does not exist")
    before = dict(MIXERS)
    try:
        runpy.run_path(path)
    except (Exception, SystemExit) as error:  # the user's own code: whatever it raises, they need the place and the reason
        raise BadInput(f"mixer_file {path}: {type(error).__name__}: {error}") from error
    if MIXERS == before and Path(path).resolve() not in loaded:  # a class that the file imports is the same when it runs once more
        raise BadInput(f'mixer_file {path} registers no mixer; end it with: MIXERS["name"] = YourClass')
    loaded.add(Path(path).resolve())
