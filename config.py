"""Every option of nanomix but the mixers' own: its default, its range and its help.

    python train.py configs/shakespeare.py --mixer=lln --max_iters 500 --no-compile

A config file is plain Python that sets options by name (`mixer = "lln"`) and may import another's:
`from configs.shakespeare import *`. The command line overrides the file, which overrides the
defaults here.
A mechanism's options stand in its own file, see mixers/__init__.py.
"""
import math
from dataclasses import fields, replace
from typing import Literal, Optional

from base.command_line import one_line, one_spelling
from base.errors import BadInput
from base.options import checked, option
from data.dataset import dataset_names
from mixers import MIXERS, MixerOptions, has_effect, layer_mixers, load_mixer_file, mixers_in_words

ACTIVATIONS = (
    "gelu", "gelu_tanh", "silu", "relu", "leaky_relu", "causal_max", "causal_min", "causal_mean",
    "causal_max_context", "causal_min_context", "causal_mean_context")


@checked
class SkeletonOptions:
    heading = "model"
    arch: Literal["gpt2", "llama"] = option(
        "gpt2", "gpt2: LayerNorm, learned positions, GELU, tied head; "
        "llama: RMSNorm, RoPE, SwiGLU, untied head")
    mixer: str = option(
        "softmax", "what mixes the tokens, in place of attention: a name, or a pattern that "
        "repeats over the layers (softmax,lln,lln: the first of every three is softmax)",
        names=lambda: MIXERS)
    block_size: int = option(64, "context length in tokens", ge=1)
    n_layer: int = option(4, "number of blocks", ge=1, le=10_000)
    n_head: int = option(4, "number of heads; divides n_embd", ge=1)
    n_embd: int = option(128, "width of the hidden states, in channels", ge=1)
    n_kv_head: Optional[int] = option(
        None, "number of key/value heads; divides n_head [default: n_head]", ge=1)
    dropout: float = option(
        0.0, "share of values dropped after the embedding and after each sub-layer", ge=0, lt=1)
    bias: Optional[bool] = option(
        None, "biases in linear layers and in LayerNorm [default: gpt2 yes, llama no]")
    pos: Optional[Literal["learned", "rope", "none"]] = option(
        None, "position encoding [default: gpt2 learned, llama rope]")
    rope_base: float = option(10000.0, "base of RoPE's wavelengths", gt=0)
    rotate_features: bool = option(
        False, "RoPE also for mixers that leave q and k as they are: before their features")
    conv: Optional[int] = option(
        None, "taps of a short causal convolution, with SiLU behind it, on queries, keys and "
        "values; 0: none [default: the mixer's own]", ge=0, le=64)
    attn_temperature: float = option(
        1.0, "scores of softmax attention are divided by it; may be changed for --eval_only", gt=0)
    norm: Optional[Literal["layer", "rms", "none"]] = option(
        None, "the norm before each mixer and FFN; the last norm stays with none "
        "[default: gpt2 layer, llama rms]")
    norm_eps: Optional[float] = option(
        None, "epsilon of the norms [default: gpt2 1e-5, llama 1e-6]", gt=0)
    ffn_hidden: Optional[int] = option(
        None, "hidden units of the FFN "
        "[default: gpt2 4 C; llama 8/3 C rounded up to a multiple of 64]", ge=1)
    ffn_bias: Optional[bool] = option(None, "biases in the FFN [default: as bias]")
    mlp_activation: Optional[Literal[ACTIVATIONS]] = option(
        None, "activation of the FFN, or a causal reduction in its place; gelu_tanh is the "
        "published GPT-2's, leaky_relu's slope is 0.1 [default: gpt2 gelu, llama silu]")
    tie_head: Optional[bool] = option(
        None, "the head shares the embedding's weights [default: gpt2 yes, llama no]")
    head_temperature: Optional[float] = option(
        None, "hidden states are divided by it before the head: a smaller one makes the "
        "predictions sharper (SSA's own temperatures multiply) "
        "[default: 0.1 if all layers are pelican, else 1]", gt=0)
    init_std: Optional[float] = option(
        None, "standard deviation of the initial weights; GPT-2's is 0.02, from which models of "
        "few channels learn later [default: 1 / sqrt(n_embd), or that of init_from]", gt=0)
    zero_init_head: bool = option(False, "the head starts at zero (untied heads only)")
    embed_rank: Optional[int] = option(
        None, "rank r of the embedding, which is then Embedding(vocabulary, r) and Linear(r, "
        "n_embd); untied heads only [default: one matrix, of full rank]", ge=1)


@checked
class ModelOptions(MixerOptions, SkeletonOptions):
    """What a model is made from. A dataclass takes the fields of its last base first."""


@checked
class DataOptions:
    heading = "data and evaluation"
    dataset: str = option(
        "shakespeare_char", "what to train on, a folder of data/, prepared when missing: a text "
        "(shakespeare_char by characters; shakespeare, books and cosmopedia in GPT-2's tokens; "
        "your own by python -m data.text) or a recall task (all others)", names=dataset_names)
    holdout: float = option(
        0.0, "share of a text's training split, at its end, that is left out of training and "
        "evaluated on in place of val: to choose options by", ge=0, lt=1)
    eval_split: Literal["val", "test"] = option(
        "val", "what --eval_only reads, training evaluates on val; only recall tasks and books "
        "have a test split")
    eval_interval: int = option(
        250, "optimiser steps between evaluations, each with a checkpoint", ge=1)
    eval_tokens: int = option(
        2**20, "most validation tokens an evaluation reads, the same ones every time", ge=1)


@checked
class OptimiserOptions:
    heading = "optimiser"
    optimizer: Literal["adamw", "muon"] = option(
        "adamw", "muon: Muon for the weights of the blocks' linear layers, AdamW for the rest")
    batch_size: int = option(
        12, "sequences of block_size tokens per micro-step, those of all processes together", ge=1)
    gradient_accumulation_steps: int = option(
        1, "micro-steps per optimiser step, which has so many times batch_size sequences", ge=1)
    max_iters: int = option(2000, "optimiser steps", ge=0)
    learning_rate: float = option(1e-3, "the highest learning rate, at the end of warm-up", ge=0)
    warmup_iters: int = option(100, "first steps, over which the learning rate rises", ge=0)
    decay_lr: bool = option(
        True, "after warm-up the learning rate falls to min_lr; otherwise it stays the same")
    lr_schedule: Literal["cosine", "linear"] = option(
        "cosine", "how the learning rate falls: along half a cosine, or a straight line")
    lr_decay_iters: Optional[int] = option(
        None, "the step at which the learning rate is down at min_lr, where it stays "
        "[default: max_iters]", ge=0)
    min_lr: Optional[float] = option(
        None, "the learning rate at the end of its fall [default: learning_rate / 10]", ge=0.0)
    weight_decay: float = option(0.1, "of AdamW, on matrices only", ge=0)
    beta1: float = option(0.9, "of AdamW", ge=0, lt=1)
    beta2: float = option(0.99, "of AdamW", ge=0, lt=1)
    grad_clip: float = option(1.0, "largest norm of the gradient; 0: no clipping", ge=0)


@checked
class RunOptions:
    heading = "run"
    out_dir: Optional[str] = option(
        None, "the run's folder [default: out/<config name>, and the mixer if set on the command "
        "line]", min_length=1)
    resume: bool = option(False, "go on from the newest checkpoint in out_dir")
    overwrite: bool = option(False, "clear a run that out_dir already holds")
    other_data: bool = option(
        False, "go on with a run although its data set has changed since")
    eval_only: bool = option(False, "only evaluate the newest checkpoint in out_dir")
    init_from: Optional[str] = option(
        None, "start from the weights of this run folder, of gpt2, gpt2-medium, gpt2-large, "
        "gpt2-xl, smollm2, of a Hugging Face folder (GPT-2, LLaMA) or of a LLaMA's .gguf",
        min_length=1)
    train_only: Literal["all", "mixer_new"] = option(
        "all", "with init_from, what is trained: all parameters, or those alone that the weights "
        "of init_from lack, which are the new mixer's")
    mixer_file: Optional[str] = option(
        None, "a Python file of yours that registers its mixer in mixers.MIXERS; with --help, its "
        "options are listed too", min_length=1, first=load_mixer_file)
    allow_leak: bool = option(
        False, "train a model whose outputs see later tokens or other sequences, or that cannot "
        "be checked for it on a CPU")
    seed: int = option(1337, "of the weights, the batches and dropout", ge=0, lt=2**63)
    device: str = option("auto", "cpu, cuda, cuda:1, mps, or auto: the best there is")
    threads: Optional[int] = option(
        None, "CPU threads, at most one a core [default: torch's]", ge=1)
    dtype: Literal["auto", "float32", "bfloat16"] = option(
        "auto", "of the heavy operations; auto: bfloat16 where it is fast")
    compile: bool = option(
        False, "torch.compile the training step; on a CPU it needs a C++ compiler and most of a "
        "minute, and gains little")
    checkpoint_activations: bool = option(
        False, "keep only each block's input for the backward pass, which forms the rest again: "
        "long sequences in less memory, for up to a third more time")
    parallel: Literal["ddp", "fsdp"] = option(
        "ddp", "under torchrun: each process holds the whole model, or a share of it")
    keep_last: int = option(2, "newest checkpoints to keep, besides the best", ge=1)
    log_interval: int = option(10, "optimiser steps between log lines", ge=1)


@checked
class WandbOptions:
    heading = "wandb"
    wandb_log: bool = option(False, "mirror the metrics to wandb")
    wandb_project: str = option("nanomix", "wandb project", min_length=1)
    wandb_run_name: Optional[str] = option(
        None, "wandb run name [default: the name of out_dir]", min_length=1)


@checked
class Options(WandbOptions, RunOptions, OptimiserOptions, DataOptions, ModelOptions):
    """All options of train.py."""


def otherwise(value, default):
    return default if value is None else value


def fill_in(options):
    """Gives the model options that were left at None what follows from the others, in place.

    ValueError, naming the option, for a model that cannot be."""
    llama = options.arch == "llama"
    C, H = options.n_embd, options.n_head
    only_pelican = set(layer_mixers(options.mixer, options.n_layer)) == {"pelican"}
    options.mixer = one_spelling(options.mixer)
    hidden = math.ceil(8 * C / (3 * 64)) * 64 if llama else 4 * C
    options.bias = otherwise(options.bias, not llama)
    options.pos = otherwise(options.pos, "rope" if llama else "learned")
    options.norm = otherwise(options.norm, "rms" if llama else "layer")
    options.norm_eps = otherwise(options.norm_eps, 1e-6 if llama else 1e-5)
    options.ffn_hidden = otherwise(options.ffn_hidden, hidden)
    options.ffn_bias = otherwise(options.ffn_bias, options.bias)
    options.mlp_activation = otherwise(options.mlp_activation, "silu" if llama else "gelu")
    options.tie_head = otherwise(options.tie_head, not llama)
    options.n_kv_head = otherwise(options.n_kv_head, H)
    options.init_std = otherwise(options.init_std, C ** -0.5)
    options.head_temperature = otherwise(options.head_temperature, 0.1 if only_pelican else 1.0)
    check_model(options)


def check_model(options):
    """ValueError, naming the option, if model options that are all set do not go together."""
    C, H = options.n_embd, options.n_head
    if C % H:
        raise ValueError(f"n_embd {C} is not divisible by n_head {H}; choose a multiple")
    if H % options.n_kv_head:
        raise ValueError(f"n_head {H} is not divisible by n_kv_head {options.n_kv_head}; "
                         "choose a divisor")
    if options.pos == "rope" and C // H % 2:
        raise ValueError(f"pos 'rope' needs an even head size, but n_embd {C} / n_head {H} is "
                         f"{C // H}")
    if options.rotate_features and options.pos != "rope":
        raise ValueError(f"rotate_features needs pos 'rope', not {options.pos!r}")
    if options.ffn_hidden >= 2**31:
        raise ValueError(f"n_embd {C} makes ffn_hidden {options.ffn_hidden}, and less than 2**31 "
                         "is possible; choose a smaller n_embd")
    if options.tie_head and options.zero_init_head:
        raise ValueError("zero_init_head would zero the embedding too, since tie_head is on; "
                         "set tie_head=False")
    if options.tie_head and options.embed_rank:
        raise ValueError(f"embed_rank {options.embed_rank} leaves no full embedding for tie_head "
                         "to share; set tie_head=False")
    for f in fields(ModelOptions):
        is_set = getattr(options, f.name) != f.default.default
        if is_set and not has_effect(f.name, options.mixer, options.n_layer):
            raise ValueError(f"{f.name} has no effect: no layer of mixer {options.mixer!r} is "
                             f"{mixers_in_words(f.name)}; leave it out")


def filled_in(options):
    """A copy of some ModelOptions in which all are set. BadInput for a model that cannot be."""
    options = replace(options)
    try:
        fill_in(options)
    except ValueError as error:
        raise BadInput(f"options: {one_line(error)}") from error
    return options
