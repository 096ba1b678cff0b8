"""The registry: every token mixer that `--mixer` can name.

A mixer is an nn.Module whose `forward(x, state=None) -> (y, state)` takes x (B, T, C), the
normalised hidden states of T new tokens on top of `state` (None: the start of the sequence), and
returns y (B, T, C), where y_t depends on the tokens up to t only. Training, prefill and decoding
are this one function: feeding a sequence in any split gives the outputs of one call on the whole.
A returned state never changes later; it is a (nested) tuple of tensors and numbers (a key/value
cache also holds on to the storage it is a view of).

It may also say what it costs, and ask to be told of each optimiser step:

    flops_per_token(T)      forward FLOPs per token, on average over a sequence of T tokens; matrix
                            products only, a multiply-add is 2, and of a product with a causal mask
                            only the visible half counts
    state_bytes(T, dtype)   bytes of one sequence's state, the largest over all lengths up to T,
                            when the heavy operations are of that torch.dtype, be it by autocast or
                            because the model is
    apply_statistics()      called once per optimiser step: the forward pass may collect
                            statistics, never apply them
    ready_to_decode()       called once before a model only decodes: what does not depend on the
                            tokens may be worked out here

and declare options of its own, named after it, which its builder then finds in `config`:

    class Options:
        mine_width: int = option(4, "its help", ge=1)    # from base.options import option

They are options of --help, config files and GPTConfig as all others are, and are refused where no
layer uses the mixer. A mixer built on another has the other's options too if its own are written
`class Options(Other.Options)`. Of the general options two are for some mixers only, which say so:

    takes = "conv", "attn_temperature"

A mixer whose q, k and v come from a QKV (mixers/parts/heads.py) or Projections
(mixers/parts/recurrent_heads.py) named c_attn, and whose heads end in a HeadNorm named norm or in a
c_proj, shows its attention matrix in tools/inspect_attention.py without further code; with a method
log_decay(x) -> (B, heads, T, channels) also the half-lives of its decays.

To add one: write mixers/mine.py, import its class here and add a line to MIXERS. Tests, benchmark
and audit take it from there. Without touching this folder: a file of your own with
`from mixers import MIXERS; MIXERS["mine"] = Mine`, and --mixer_file=PATH; a program of your own
that adds a mixer with options calls gather_options() behind it.
"""
import runpy
import sys
from functools import partial
from pathlib import Path

from pydantic import ValidationError

from base.command_line import nearest, one_line, one_spelling, shortened
from base.errors import BadInput
from base.files import is_file, read_bytes
from base.options import checked, declared, replace_options
from base.user_code import files, in_words, sources_of, users_place
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
from mixers.regla import ReGLA
from mixers.retnet import RetNet
from mixers.softmax import Softmax
from mixers.ssa import SSA
from mixers.swa import SWA
from mixers.toptheta import TopTheta

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
    "regla": ReGLA,
    "toptheta": TopTheta,
}
OF_A_TRAINED_MODEL = {"toptheta"}  # not among "all": these start as another mixer's trained model
loaded = {}  # user's file -> its code, and the mixers that it registered
imported = set()  # files of the modules, of no library, that users' files import
CODE_BYTES = 2**24  # the longest such file


@checked
class MixerOptions:
    """The options of all mechanisms, from the registry; config.ModelOptions is made from it."""
    gathered = {}  # option -> its type, its default with help and limits
    headings = {}  # option -> under what --help lists it


def said_of(name, attribute):
    """What a mixer's class says of it, or None."""
    builder = MIXERS[name]
    if isinstance(builder, partial):
        builder = builder.func
    return getattr(builder, attribute, None)


def options_class(name):
    """The class in which a mixer declares its options, or None."""
    return said_of(name, "Options")


def mixers_with(option):
    """The names of the mixers that declare an option, or take one of those that not all mixers
    take; none for an option of all (n_head, dropout)."""
    return [name for name in MIXERS
            if hasattr(options_class(name), option) or option in (said_of(name, "takes") or ())]


def mixers_in_words(option):
    """The same for messages: "lln or lln_diag"."""
    *others, last = mixers_with(option)
    return f"{', '.join(others)} or {last}" if others else last


def mechanism_of(option):
    """The mixer that an option belongs to, "lln" for lln_matching, or None for a general one."""
    if option not in MixerOptions.gathered:
        return None
    return mixers_with(option)[0]


def gather_options():
    """Gives MixerOptions, and the classes made from it, the options of the mixers registered now.

    ValueError for a declaration that is wrong, or a name that is taken."""
    found = {}
    for name in MIXERS:
        if options_class(name) is None:
            continue
        for option, (kind, field) in declared(options_class(name)).items():
            if option in found and found[option][1] is not field:
                raise ValueError(f"option {option} is of mixer {mixers_with(option)[0]} already; "
                                 "choose another name")
            found[option] = (kind, field)
    if found != MixerOptions.gathered:
        replace_options(MixerOptions, found)
    MixerOptions.gathered = found
    MixerOptions.headings = {option: "mixer " + ", ".join(mixers_with(option)) for option in found}


def layer_mixers(mixer, n_layer=None):
    """The mixer's name for each layer.

    mixer: a name, or a pattern `softmax,lln,lln` (also joined by +), layer i taking entry i modulo
    its length; without n_layer, the pattern itself. ValueError with the choices for an unknown
    name."""
    pattern = one_spelling(mixer).split(",")
    for name in pattern:
        if name not in MIXERS:
            have = ", ".join(sorted(MIXERS))
            raise ValueError(f"mixer {name!r}{nearest(name, MIXERS, '')}; have {have}")
    return [pattern[i % len(pattern)] for i in range(n_layer or len(pattern))]


def mixer_names(text):
    """The entries of a list of mixers, each a name or a pattern joined by +; "all" is every one but
    OF_A_TRAINED_MODEL.

    BadInput with the choices for an unknown name."""
    if text == "all":
        return [name for name in MIXERS if name not in OF_A_TRAINED_MODEL]
    try:
        patterns = ["+".join(layer_mixers(entry)) for entry in text.split(",")]
    except ValueError as error:
        raise BadInput(f"--mixers={text}: {error}") from error
    return list(dict.fromkeys(patterns))  # each once, in their order


def has_effect(option, mixer, n_layer):
    """Whether an option matters to a model: not if it is of mixers that none of its layers has."""
    users = mixers_with(option)
    return not users or any(name in users for name in layer_mixers(mixer, n_layer))


def load_mixer_file(path):
    """Runs a user's file, which registers its mixer in MIXERS, and gathers its options.

    A file that has run, is the same still and whose mixers are there does not run again. BadInput
    if it does not run, registers none, or declares options that cannot be."""
    if not is_file(path):
        raise BadInput(f"mixer_file {shortened(path)} does not exist, or is no file")
    code = read_bytes(Path(path), CODE_BYTES, "name a Python file")
    key = Path(path).resolve()
    before = dict(MIXERS)
    old_code, registered = loaded.get(key, (None, {}))
    if code == old_code and registered.items() <= before.items():
        return
    files.add(Path(path).resolve())
    modules = set(sys.modules)
    try:
        runpy.run_path(path)
        gather_options()
        imported.update(sources_of(sys.modules.keys() - modules))
    except (Exception, SystemExit) as error:  # the user's own code: whatever it raises
        MIXERS.clear()
        MIXERS.update(before)
        reason = one_line(error) if isinstance(error, ValidationError) else in_words(error)
        raise BadInput(f"mixer_file {users_place(error) or path}: {reason}") from error
    new = {name: builder for name, builder in MIXERS.items() if before.get(name) is not builder}
    # a class that the file imports is the same when the file runs once more
    if not new and key not in loaded:
        raise BadInput(f'mixer_file {path} registers no mixer; '
                       'end it with: MIXERS["name"] = YourClass')
    loaded[key] = code, {**registered, **new}


gather_options()
