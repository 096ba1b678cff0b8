"""Every option of nanomix: its default, its range and its help; and how the options are read.

    python train.py configs/shakespeare.py --mixer=lln --max_iters 500 --no-compile

A config file is plain Python that sets options by name (`mixer = "lln"`) and may import another's:
`from configs.shakespeare import *`. The command line overrides the file, the file overrides the defaults here.
pydantic checks types and ranges of both; argparse reads the command line.
"""
from typing import Literal, Optional

from base.options import checked, option

ACTIVATIONS = ("gelu", "gelu_tanh", "silu", "causal_max", "causal_min", "causal_mean",
               "causal_max_context", "causal_min_context", "causal_mean_context")


@checked
class ModelOptions:
    arch: Literal["gpt2", "llama"] = option("gpt2", "gpt2: LayerNorm, learned positions, GELU, tied head; llama: RMSNorm, RoPE, SwiGLU, untied head")
    mixer: str = option("softmax", "a name of the registry, or a pattern over layers: softmax,lln,lln")
    block_size: int = option(64, "context length in tokens", ge=1)
    n_layer: int = option(4, "number of blocks", ge=1)
    n_head: int = option(4, "number of heads; divides n_embd", ge=1)
    n_embd: int = option(128, "width of the hidden states, in channels", ge=1)
    n_kv_head: Optional[int] = option(None, "number of key/value heads; divides n_head [default: n_head]", ge=1)
    dropout: float = option(0.0, "share of values dropped after the embedding and after each sub-layer", ge=0, lt=1)
    bias: Optional[bool] = option(None, "biases in linear layers and in LayerNorm [default: gpt2 yes, llama no]")
    pos: Optional[Literal["learned", "rope", "none"]] = option(None, "position encoding [default: gpt2 learned, llama rope]")
    rope_base: float = option(10000.0, "base of RoPE's wavelengths", gt=0)
    norm_eps: Optional[float] = option(None, "epsilon of the norms [default: gpt2 1e-5, llama 1e-6]", gt=0)
    ffn_hidden: Optional[int] = option(None, "hidden units of the FFN [default: gpt2 4 C; llama 8/3 C rounded up to a multiple of 64]", ge=1)
    ffn_bias: Optional[bool] = option(None, "biases in the FFN [default: as bias]")
    mlp_activation: Optional[Literal[ACTIVATIONS]] = option(None, "activation of the FFN, or a causal reduction in its place; gelu_tanh is the published GPT-2's [default: gpt2 gelu, llama silu]")
    tie_head: Optional[bool] = option(None, "the head shares the embedding's weights [default: gpt2 yes, llama no]")
    head_temperature: Optional[float] = option(None, "hidden states are divided by it before the head [default: 0.1 if all layers are pelican, else 1]", gt=0)
    init_std: float = option(0.02, "standard deviation of the initial weights; models of few channels learn sooner from a larger one", gt=0)
    zero_init_head: bool = option(False, "the head starts at zero (untied heads only)")
    embed_rank: Optional[int] = option(None, "the embedding is Embedding(V, r) and Linear(r, C) (untied heads only)", ge=1)
    # options named after a mechanism are refused where no layer uses it
    lln_matching: Literal["table", "published"] = option("table", "LLN's moment matching: a table for the head size, or the paper's constants for D = 64")
    lln_diag_mode: Literal["mean", "sum", "convex"] = option("mean", "LLN and Diag: half each, r and p learnable, r and 1 - r learnable")
    ssa_query_token: bool = option(True, "SSA's token term for queries")
    ssa_query_position: bool = option(True, "SSA's position term for queries")
    ssa_key_token: bool = option(False, "SSA's token term for keys")
    ssa_key_position: bool = option(False, "SSA's position term for keys")
    ssa_value_token: bool = option(True, "SSA's token term for values")
    ssa_value_position: bool = option(False, "SSA's position term for values")
    ssa_share: bool = option(True, "SSA's token terms reuse the projection that they scale; otherwise an MLP each")
    ssa_per_head: bool = option(False, "SSA's temperatures differ between heads")
    performer_features: Optional[int] = option(None, "Performer's features m [default: D log D rounded to a multiple of 8]", ge=1)
    performer_redraw: int = option(0, "optimiser steps between draws of Performer's features; 0: never", ge=0)
    linformer_segment: int = option(64, "tokens L in a segment of Linformer", ge=1)
    gla_divisor: float = option(16.0, "x", gt=0)
    gla_rank: int = option(16, "x", ge=1)
    deltanet_negative: bool = option(False, "x")
    mamba2_state: Optional[int] = option(None, "x", ge=1)
    mamba2_expand: int = option(1, "x", ge=1)
    kda_bounded: bool = option(True, "x")
    swa_window: Optional[int] = option(None, "x", ge=1)
    swa_sinks: int = option(0, "x", ge=0)
    linformer_slots: int = option(4, "slots r of a completed segment of Linformer", ge=1)


@checked
class Options(ModelOptions):
    # run
    out_dir: Optional[str] = option(None, "the run's folder [default: out/<config name>, and the mixer if set on the command line]", min_length=1)
    resume: bool = option(False, "go on from the newest checkpoint in out_dir")
    overwrite: bool = option(False, "clear a run that out_dir already holds")
    eval_only: bool = option(False, "only evaluate the newest checkpoint in out_dir")
    init_from: Optional[str] = option(None, "start from the weights of this run folder, of gpt2, gpt2-medium, gpt2-large, gpt2-xl, or of a Hugging Face folder (GPT-2, LLaMA)", min_length=1)
    train_only: Literal["all", "mixer_new"] = option("all", "all parameters, or only those that the weights of init_from lack: the mixer's new ones")
    mixer_file: Optional[str] = option(None, "a Python file of yours that registers its mixer in mixers.MIXERS", min_length=1)
    allow_leak: bool = option(False, "train a model whose outputs see later tokens or other sequences, or that cannot be checked for it on a CPU")
    seed: int = option(1337, "of the weights, the batches and dropout", ge=0, lt=2**63)
    device: str = option("auto", "cpu, cuda, cuda:1, mps, or auto: the best there is")
    dtype: Literal["auto", "float32", "bfloat16"] = option("auto", "of the heavy operations; auto: bfloat16 where it is fast")
    compile: bool = option(False, "torch.compile the training step; on a CPU it needs a C++ compiler and most of a minute, and gains little")
    parallel: Literal["ddp", "fsdp"] = option("ddp", "under torchrun: each process holds the whole model, or a share of it")
    # data and evaluation
    dataset: str = option("shakespeare_char", "a folder of data/; prepared when missing")
    eval_split: Literal["val", "test"] = option("val", "what --eval_only evaluates on; recall tasks have a test split")
    eval_interval: int = option(250, "optimiser steps between evaluations, each with a checkpoint", ge=1)
    eval_tokens: int = option(2**20, "most validation tokens an evaluation reads, the same ones every time", ge=1)
    keep_last: int = option(2, "newest checkpoints to keep, besides the best", ge=1)
    log_interval: int = option(10, "optimiser steps between log lines", ge=1)
    wandb_log: bool = option(False, "mirror the metrics to wandb")
    wandb_project: str = option("nanomix", "wandb project", min_length=1)
    wandb_run_name: Optional[str] = option(None, "wandb run name [default: the name of out_dir]", min_length=1)
    # optimiser
    batch_size: int = option(12, "sequences per micro-step, over all processes", ge=1)
    gradient_accumulation_steps: int = option(1, "micro-steps per optimiser step", ge=1)
    max_iters: int = option(2000, "optimiser steps", ge=0)
    learning_rate: float = option(1e-3, "peak learning rate", ge=0)
    lr_schedule: Literal["cosine", "linear"] = option("cosine", "shape of the decay")
    decay_lr: bool = option(True, "decay the learning rate; otherwise it is constant after warm-up")
    warmup_iters: int = option(100, "steps of linear warm-up", ge=0)
    lr_decay_iters: Optional[int] = option(None, "the step at which min_lr is reached [default: max_iters]", ge=0)
    min_lr: Optional[float] = option(None, "learning rate at the end of the decay [default: learning_rate / 10]", ge=0.0)
    weight_decay: float = option(0.1, "of AdamW, on matrices only", ge=0)
    beta1: float = option(0.9, "of AdamW", ge=0, lt=1)
    beta2: float = option(0.99, "of AdamW", ge=0, lt=1)
    grad_clip: float = option(1.0, "largest norm of the gradient; 0: no clipping", ge=0)
