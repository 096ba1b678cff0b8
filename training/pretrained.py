"""Pretrained models: the weights of Hugging Face's GPT-2 and LLaMA, from safetensors.

    python train.py --init_from=gpt2 --dataset=shakespeare --max_iters=0       GPT-2, fetched (0.5 GB), its validation loss
    python train.py --init_from=my/llama --mixer=ssa --dataset=mine            a local folder: config.json, model.safetensors

The model options come from the folder's config.json; what it asks for and we lack is refused, never left out.
"""
import json
import re
from dataclasses import fields, replace
from pathlib import Path

import torch

from base.errors import BadInput
from base.files import read_json
from config import ModelOptions
from mixers import mechanism_of
from model import model_config
from training import checkpoint

NAMES = ("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl")
REMEDY = "fetch the folder again"

# config.json's name -> our option
FIELDS = {
    "gpt2": {"vocab_size": "vocab_size", "n_positions": "block_size", "n_layer": "n_layer", "n_head": "n_head", "n_embd": "n_embd",
             "n_inner": "ffn_hidden", "layer_norm_epsilon": "norm_eps", "activation_function": "mlp_activation",
             "tie_word_embeddings": "tie_head"},
    "llama": {"vocab_size": "vocab_size", "max_position_embeddings": "block_size", "num_hidden_layers": "n_layer",
              "num_attention_heads": "n_head", "num_key_value_heads": "n_kv_head", "hidden_size": "n_embd",
              "intermediate_size": "ffn_hidden", "rms_norm_eps": "norm_eps", "hidden_act": "mlp_activation",
              "tie_word_embeddings": "tie_head", "attention_bias": "bias", "mlp_bias": "ffn_bias"},
}
REQUIRED = {"vocab_size", "block_size", "n_layer", "n_head", "n_embd"}
ACTIVATIONS = {"gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh", "gelu": "gelu", "silu": "silu", "swish": "silu"}
# fields of config.json that change nothing in the function computed, or in training only
HARMLESS = re.compile(r"_.*|model_type|architectures|(torch_)?dtype|transformers_version|transformers\.js_config|use_cache|initializer_range"
                      r"|.*_token_id|.*pdrop|.*dropout|summary_.*|task_specific_params|n_ctx|reorder_and_upcast_attn|pretraining_tp"
                      r"|id2label|label2id|return_dict|is_llama_config")
BUFFERS = re.compile(r"\.attn\.(masked_)?bias$|rotary_emb\.inv_freq$")  # masks and wavelengths, which old files hold
PREFIX = {"gpt2": "transformer.", "llama": "model."}
# our layer -> Hugging Face's, of which several are stacked in this order
LAYERS = {
    "gpt2": ({"embed": ["wte"], "pos_embed": ["wpe"], "norm": ["ln_f"], "head": ["lm_head"]}, "h",
             {"norm1": ["ln_1"], "mixer.c_attn.proj": ["attn.c_attn"], "mixer.c_proj": ["attn.c_proj"],
              "norm2": ["ln_2"], "mlp.c_fc": ["mlp.c_fc"], "mlp.c_proj": ["mlp.c_proj"]}),
    "llama": ({"embed": ["embed_tokens"], "norm": ["norm"], "head": ["lm_head"]}, "layers",
              {"norm1": ["input_layernorm"], "mixer.c_attn.proj": [f"self_attn.{x}_proj" for x in "qkv"],
               "mixer.c_proj": ["self_attn.o_proj"], "norm2": ["post_attention_layernorm"],
               "mlp.c_fc": ["mlp.gate_proj", "mlp.up_proj"], "mlp.c_proj": ["mlp.down_proj"]}),
}


def layers(config):
    """(our layer, [Hugging Face's layers], whether their matrix is the transpose of ours) of a model, without their prefix."""
    whole, stack, block = LAYERS[config.arch]
    for ours, theirs in whole.items():
        if not (ours == "head" and config.tie_head):
            yield ours, theirs, False
    for i in range(config.n_layer):
        for ours, theirs in block.items():
            yield f"blocks.{i}.{ours}", [f"{stack}.{i}.{name}" for name in theirs], config.arch == "gpt2" and ".c_" in ours


def is_pretrained(init_from):
    """Whether init_from names one of GPT-2's sizes or a folder of Hugging Face's; otherwise it is a run folder."""
    folder = Path(init_from)
    if init_from in NAMES and not folder.exists():
        return True
    return not (folder / "checkpoints").exists() and any((folder / f"{name}{index}").is_file() for index in ("", ".index.json")
                                                         for name in ("model.safetensors", "pytorch_model.bin"))


def local(init_from, name):
    """The path of a file of a pretrained model; the hub's are fetched once and kept in its own cache."""
    if Path(init_from).exists():
        return Path(init_from) / name
    from huggingface_hub import hf_hub_download  # here, as only these names need it
    try:
        return Path(hf_hub_download(f"openai-community/{init_from}", name))
    except Exception as error:  # of whichever HTTP client it is built on
        raise BadInput(f"--init_from={init_from}: cannot fetch {name} from the Hugging Face hub: {str(error).splitlines()[0]}; connect to "
                       "the network, or name a local folder with config.json and model.safetensors") from error


# config.json ---------------------------------------------------------------------------------------------------------

def read_config(init_from):
    """The GPTConfig that a pretrained model's config.json describes. BadInput for what we do not implement, by name."""
    path = local(init_from, "config.json")
    values = read_json(path, REMEDY)

    def refuse(name, value):
        raise BadInput(f"{path}: {name} {json.dumps(value)} is not implemented here; have GPT-2 and LLaMA in their plain forms")

    arch = values.get("model_type")
    if arch not in ("gpt2", "llama"):
        refuse("model_type", arch)
    ours = {option: values[name] for name, option in FIELDS[arch].items() if values.get(name) is not None}
    missing = [name for name, option in FIELDS[arch].items() if option in REQUIRED - ours.keys()]
    if missing:
        raise BadInput(f"{path} lacks {', '.join(missing)}; {REMEDY}")
    activation = ours.get("mlp_activation", "gelu_new" if arch == "gpt2" else "silu")
    if not isinstance(activation, str) or activation not in ACTIVATIONS:
        refuse("activation_function" if arch == "gpt2" else "hidden_act", activation)
    ours["mlp_activation"] = ACTIVATIONS[activation]
    rest = {name: value for name, value in values.items() if name not in FIELDS[arch] and not HARMLESS.fullmatch(name)}
    if rest.pop("scale_attn_weights", True) is not True:
        refuse("scale_attn_weights", values["scale_attn_weights"])
    if arch == "llama":
        ours.setdefault("ffn_bias", False)
        ours["rope_base"] = rest.pop("rope_theta", None) or 10000.0
        for name in ("rope_scaling", "rope_parameters"):
            rope = rest.pop(name, None) or {"rope_type": "default"}
            if not isinstance(rope, dict) or rope.get("rope_type", rope.get("type")) != "default" or rope.keys() - {"rope_type", "type", "rope_theta"}:
                refuse(name, rope)
            ours["rope_base"] = rope.get("rope_theta", ours["rope_base"])
    config = model_config(ours | {"arch": arch}, path)
    if rest.pop("head_dim", None) not in (None, config.n_embd // config.n_head):
        refuse("head_dim", values["head_dim"])
    for name, value in rest.items():
        if value not in (None, False, [], {}):
            refuse(name, value)
    return config


def take_architecture(options, explicit):
    """The options with the pretrained model's architecture. BadInput for options that were set (`explicit`) to something else."""
    config = read_config(options.init_from)
    values = {f.name: getattr(config, f.name) for f in fields(ModelOptions) if f.name not in ("mixer", "dropout") and not mechanism_of(f.name)}
    if "block_size" in explicit:  # a shorter context than it was trained on is fine
        values["block_size"] = min(values["block_size"], options.block_size)
    odd = [f"{name} {getattr(options, name)}, which is {value} there" for name, value in values.items()
           if name in explicit and getattr(options, name) not in (None, value)]
    if odd:
        raise BadInput(f"--init_from={options.init_from} does not go with {', '.join(odd)}; leave these options out")
    return replace(options, **values)


# Weights -------------------------------------------------------------------------------------------------------------

def read_tensors(init_from):
    """Hugging Face's name -> tensor, from model.safetensors or from its shards. BadInput where there is neither."""
    folder = Path(init_from)
    if not folder.exists():
        return checkpoint.read_tensors(local(init_from, "model.safetensors"), REMEDY)
    index = folder / "model.safetensors.index.json"
    if (folder / "model.safetensors").exists():
        shards = ["model.safetensors"]
    elif index.exists():
        shards = read_json(index, REMEDY).get("weight_map")
        if not isinstance(shards, dict) or not all(isinstance(s, str) and Path(s).name == s for s in shards.values()):
            raise BadInput(f"{index} is damaged: its weight_map names no files of this folder; {REMEDY}")
        shards = sorted(set(shards.values()))
    else:
        raise BadInput(f"{folder} holds its weights as a pickle, which could run code and is not read; convert it to safetensors where you trust it: "
                       "transformers' AutoModelForCausalLM.from_pretrained(FOLDER).save_pretrained(NEW_FOLDER)")
    tensors = {}
    for shard in shards:
        tensors |= checkpoint.read_tensors(folder / shard, REMEDY)
    return tensors


def load(init_from, config):
    """Our name -> tensor of a pretrained model, as a GPT of `config` needs them. BadInput if its vocabulary or one of its
    tensors does not fit."""
    vocab_size = read_config(init_from).vocab_size
    if vocab_size != config.vocab_size:
        raise BadInput(f"--init_from={init_from} has a vocabulary of {vocab_size:,}, the data set one of {config.vocab_size:,}; choose a "
                       "--dataset prepared with its tokenizer (GPT-2's: shakespeare)")
    prefix = PREFIX[config.arch]
    left = {name.removeprefix(prefix): t for name, t in read_tensors(init_from).items() if not BUFFERS.search(name)}
    if config.tie_head:
        left.pop("lm_head.weight", None)
    ours = {}
    for layer, theirs, transposed in layers(config):
        for kind in ("weight", "bias"):
            names = [f"{name}.{kind}" for name in theirs]
            if all(name in left for name in names):
                parts = [left.pop(name) for name in names]
                try:
                    ours[f"{layer}.{kind}"] = torch.cat([p.t() if transposed else p for p in parts])
                except RuntimeError as error:
                    raise BadInput(f"{init_from}: {', '.join(names)} have shapes {[tuple(p.shape) for p in parts]}; {REMEDY}") from error
    if left:
        raise BadInput(f"{init_from}: no place for its tensors {', '.join(sorted(left)[:5])}{', ...' if len(left) > 5 else ''} in arch {config.arch!r}")
    if "pos_embed.weight" in ours:
        ours["pos_embed.weight"] = ours["pos_embed.weight"][:config.block_size]
    return ours
