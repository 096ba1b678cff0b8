"""Pretrained models: the weights of Hugging Face's GPT-2 and LLaMA from safetensors, LLaMA's from
GGUF.

    python train.py --init_from=gpt2 --dataset=shakespeare --max_iters=0
        GPT-2, fetched (0.5 GB), and its validation loss
    python train.py --init_from=my/llama --mixer=ssa --dataset=mine
        a local folder: config.json, model.safetensors
    python -m data.text --input=my.txt --name=mine --tokenizer=smollm2
    python train.py --init_from=smollm2 --dataset=mine
        SmolLM2-135M-Instruct, fetched (93 MB), on a text in its own tokens; MODEL.gguf likewise

The model options come from the folder's config.json or the GGUF's header; what it asks for and we
lack is refused, never left out. A data set has to be in the tokens of the model.
"""
import json
import math
import re
from dataclasses import fields, replace
from pathlib import Path
from typing import Optional

import torch
from pydantic import BaseModel, ConfigDict, create_model

from base.errors import BadInput, first_few, printable
from base.files import exists, is_file, read_bytes, read_json
from base.gguf import GGUF
from config import ModelOptions
from data.named_tokenizer import pretrained_tokenizer
from data.sources import smollm2, smollm2_path
from data.tokenizer import same_tokens
from mixers import mechanism_of
from model import GPTConfig, model_config
from training import checkpoint
from training.gguf import llama_config, llama_tensors

NAMES = ("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl", "smollm2")  # which are fetched
REMEDY = "fetch the folder again"
# model options that no weights depend on: they may be chosen anew
OWN = {"mixer", "dropout", "attn_temperature", "rotate_features"}

# config.json's name -> our option
FIELDS = {
    "gpt2": {
        "vocab_size": "vocab_size",
        "n_positions": "block_size",
        "n_layer": "n_layer",
        "n_head": "n_head",
        "n_embd": "n_embd",
        "n_inner": "ffn_hidden",
        "layer_norm_epsilon": "norm_eps",
        "activation_function": "mlp_activation",
        "tie_word_embeddings": "tie_head",
        "initializer_range": "init_std",
    },
    "llama": {
        "vocab_size": "vocab_size",
        "max_position_embeddings": "block_size",
        "num_hidden_layers": "n_layer",
        "num_attention_heads": "n_head",
        "num_key_value_heads": "n_kv_head",
        "hidden_size": "n_embd",
        "intermediate_size": "ffn_hidden",
        "rms_norm_eps": "norm_eps",
        "hidden_act": "mlp_activation",
        "tie_word_embeddings": "tie_head",
        "attention_bias": "bias",
        "mlp_bias": "ffn_bias",
        "initializer_range": "init_std",
    },
}
REQUIRED = {"vocab_size", "block_size", "n_layer", "n_head", "n_embd"}
ACTIVATION_FIELD = {"gpt2": "activation_function", "llama": "hidden_act"}
ACTIVATIONS = {  # theirs -> ours
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu": "gelu",
    "silu": "silu",
    "swish": "silu",
}
# fields of config.json that change nothing in the function computed, or in training only
HARMLESS = re.compile(
    r"_.*|model_type|architectures|(torch_)?dtype|transformers_version|transformers\.js_config"
    r"|use_cache|.*_token_id|.*pdrop|.*dropout|summary_.*|task_specific_params"
    r"|n_ctx|reorder_and_upcast_attn|pretraining_tp|id2label|label2id|return_dict|is_llama_config")
# masks and wavelengths, which old files hold among the weights
BUFFERS = re.compile(r"\.attn\.(masked_)?bias$|rotary_emb\.inv_freq$")

PREFIX = {"gpt2": "transformer.", "llama": "model."}
STACK = {"gpt2": "h", "llama": "layers"}  # their blocks
# our layer -> Hugging Face's, of which several are stacked in this order
OUTER_LAYERS = {
    "gpt2": {"embed": ["wte"], "pos_embed": ["wpe"], "norm": ["ln_f"], "head": ["lm_head"]},
    "llama": {"embed": ["embed_tokens"], "norm": ["norm"], "head": ["lm_head"]},
}
BLOCK_LAYERS = {
    "gpt2": {
        "norm1": ["ln_1"],
        "mixer.c_attn.proj": ["attn.c_attn"],
        "mixer.c_proj": ["attn.c_proj"],
        "norm2": ["ln_2"],
        "mlp.c_fc": ["mlp.c_fc"],
        "mlp.c_proj": ["mlp.c_proj"],
    },
    "llama": {
        "norm1": ["input_layernorm"],
        "mixer.c_attn.proj": ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"],
        "mixer.c_proj": ["self_attn.o_proj"],
        "norm2": ["post_attention_layernorm"],
        "mlp.c_fc": ["mlp.gate_proj", "mlp.up_proj"],
        "mlp.c_proj": ["mlp.down_proj"],
    },
}


def layers(config):
    """(our layer, [Hugging Face's layers without their prefix], whether their matrix is the
    transpose of ours) of a model."""
    for ours, theirs in OUTER_LAYERS[config.arch].items():
        if not (ours == "head" and config.tie_head):
            yield ours, theirs, False
    for i in range(config.n_layer):
        for ours, theirs in BLOCK_LAYERS[config.arch].items():
            names = [f"{STACK[config.arch]}.{i}.{name}" for name in theirs]
            yield f"blocks.{i}.{ours}", names, config.arch == "gpt2" and ".c_" in ours


def is_pretrained(init_from):
    """Whether init_from names one of NAMES, a GGUF file or a folder of Hugging Face's; otherwise it
    is a run folder."""
    folder = Path(init_from)
    if init_from in NAMES and not exists(folder) or is_gguf(init_from):
        return True
    if exists(folder / "checkpoints"):
        return False
    for weights in ("model.safetensors", "pytorch_model.bin"):
        if exists(folder / weights) or exists(folder / f"{weights}.index.json"):
            return True
    return False


def is_gguf(init_from):
    if init_from == "smollm2":
        return not exists(init_from)
    return Path(init_from).suffix == ".gguf" and not exists(Path(init_from) / "checkpoints")


def open_gguf(init_from):
    return GGUF(smollm2() if init_from == "smollm2" else init_from)


def local_path(init_from, name):
    """The path of a file of a pretrained model. The hub's are fetched once and kept in its own
    cache."""
    if exists(init_from):
        return Path(init_from) / name
    from huggingface_hub import hf_hub_download  # here, as only these names need it
    try:
        return Path(hf_hub_download(f"openai-community/{init_from}", name))
    except Exception as error:  # of whichever HTTP client it is built on
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise BadInput(f"--init_from={init_from}: cannot fetch {name} from the Hugging Face hub: "
                       f"{reason}; connect to the network, or name a local folder with config.json "
                       "and model.safetensors") from error


# config.json --------------------------------------------------------------------------------------

def read_config(init_from):
    """The GPTConfig of a pretrained model. BadInput for what we do not implement, by name."""
    if is_gguf(init_from):
        file = open_gguf(init_from)
        config = config_of(file.path, llama_config(file))
        parameters = sum(math.prod(info.shape) for info in file.tensors.values())
        refuse_impossible_sizes(file.path, config, parameters, "its tensors")
        return config
    path = local_path(init_from, "config.json")
    arch = read_json(path, REMEDY).get("model_type")
    if arch not in ("gpt2", "llama"):
        refuse(path, "model_type", arch)
    values = read_json(path, REMEDY, schema(arch)).model_dump(exclude_none=True)
    config = config_of(path, values | {"model_type": arch})
    files = [file for file in path.parent.glob("*.safetensors") if is_file(file)]
    if files:  # with a byte or more for each parameter
        n_bytes = sum(file.stat().st_size for file in files)
        refuse_impossible_sizes(path, config, n_bytes, "the files of weights beside it")
    return config


def config_of(path, values):
    """The GPTConfig that config.json's content describes. path: of the file that says so. BadInput
    for what we do not implement, by name."""
    arch = values["model_type"]
    ours = {option: values[name] for name, option in FIELDS[arch].items() if name in values}
    missing = [name for name, option in FIELDS[arch].items() if option in REQUIRED - ours.keys()]
    if missing:
        raise BadInput(f"{path} lacks {', '.join(missing)}; {REMEDY}")
    activation = ours.get("mlp_activation", "gelu_new" if arch == "gpt2" else "silu")
    if activation not in ACTIVATIONS:
        refuse(path, ACTIVATION_FIELD[arch], activation)
    ours["mlp_activation"] = ACTIVATIONS[activation]
    known = set(FIELDS[arch]) | {"scale_attn_weights", "head_dim"}
    if not values.get("scale_attn_weights", True):
        refuse(path, "scale_attn_weights", False)
    if arch == "llama":
        known |= {"rope_theta", "rope_scaling", "rope_parameters"}
        ours["rope_base"] = rope_base(path, values)
        ours.setdefault("ffn_bias", False)
    ours.setdefault("init_std", 0.02)  # of what the mixer adds to these weights
    config = model_config(ours | {"arch": arch}, path)
    if values.get("head_dim", config.n_embd // config.n_head) != config.n_embd // config.n_head:
        refuse(path, "head_dim", values["head_dim"])
    for name, value in values.items():
        if name not in known and not HARMLESS.fullmatch(name) and value not in (False, [], {}):
            refuse(path, name, value)
    return config


def schema(arch):
    """The pydantic type of config.json: what we read of it has the types of our own options."""
    types = {f.name: f.type for f in fields(GPTConfig)} | {"mlp_activation": str}
    known = {name: (Optional[types[option]], None) for name, option in FIELDS[arch].items()}
    return create_model(f"config.json of {arch}", **known,
                        scale_attn_weights=(Optional[bool], None),
                        head_dim=(Optional[int], None),
                        rope_theta=(Optional[float], None),
                        rope_scaling=(Optional[dict], None),
                        rope_parameters=(Optional[dict], None),
                        __config__=ConfigDict(extra="allow"))


def refuse(path, name, value):
    shown = json.dumps(value)
    if len(shown) > 100:
        shown = f"{shown[:100]} ..."
    raise BadInput(f"{path}: {name} {shown} is not implemented here; have GPT-2 and LLaMA in their "
                   "plain forms")


def rope_base(path, values):
    """The base of RoPE, which transformers has written in three places over time."""
    base = values.get("rope_theta", 10000.0)
    for name in ("rope_scaling", "rope_parameters"):
        rope = values.get(name) or {"rope_type": "default"}
        kind = rope.get("rope_type", rope.get("type"))
        if kind != "default" or rope.keys() - {"rope_type", "type", "rope_theta"}:
            refuse(path, name, rope)
        base = rope.get("rope_theta", base)
    return base


def refuse_impossible_sizes(path, config, most, where):
    """BadInput if the model has more parameters than its weights can hold, which is `most`: a model
    far beyond them is never built."""
    parameters = checkpoint.least_parameters(config)
    if parameters > most:
        raise BadInput(f"{path} describes a model of {parameters:,} parameters or more, {where} "
                       f"have {most:,}; {REMEDY}")


def take_architecture(options, explicit):
    """The options with the pretrained model's architecture. BadInput for options that were set
    (`explicit`) to something else."""
    config = read_config(options.init_from)
    values = {}
    for f in fields(ModelOptions):
        if f.name not in OWN and not mechanism_of(f.name):
            values[f.name] = getattr(config, f.name)
    if options.conv == 0:  # which is none, as there
        values["conv"] = 0
    if "block_size" in explicit:  # a shorter context than it was trained on is fine
        values["block_size"] = min(values["block_size"], options.block_size)
    contradicted = []
    for name, value in values.items():
        if name == "init_std" and options.init_std is not None:
            values[name] = options.init_std
        elif name in explicit and getattr(options, name) not in (None, value):
            contradicted.append(f"{name} {getattr(options, name)}, which is {value} there")
    if contradicted:
        raise BadInput(f"--init_from={options.init_from} does not go with "
                       f"{', '.join(contradicted)}; leave these options out")
    return replace(options, **values)


# Weights ------------------------------------------------------------------------------------------

class WeightIndex(BaseModel):
    """model.safetensors.index.json."""
    weight_map: dict[str, str]  # tensor's name -> file's name


def weight_files(init_from):
    """The paths of model.safetensors or of its shards. BadInput where there is neither."""
    if not exists(init_from):
        return [local_path(init_from, "model.safetensors")]
    folder = Path(init_from)
    index = folder / "model.safetensors.index.json"
    if exists(folder / "model.safetensors"):
        return [folder / "model.safetensors"]
    if not exists(index):
        raise BadInput(f"{folder} holds its weights as a pickle, which could run code and is not "
                       "read; convert it to safetensors where you trust it: transformers' "
                       "AutoModelForCausalLM.from_pretrained(FOLDER).save_pretrained(NEW_FOLDER)")
    shards = read_json(index, REMEDY, WeightIndex).weight_map
    for shard in shards.values():
        if Path(shard).name != shard:
            raise BadInput(f"{index} is damaged: its weight_map names {shard!r}, which is no file "
                           f"of this folder; {REMEDY}")
    return [folder / shard for shard in sorted(set(shards.values()))]


def weight_paths(init_from):
    """The paths of all files with weights of a pretrained model, of whatever kind."""
    if is_gguf(init_from):
        return [smollm2() if init_from == "smollm2" else Path(init_from)]
    return weight_files(init_from)


def read_tensors(init_from):
    """Hugging Face's name -> tensor."""
    if is_gguf(init_from):
        file = open_gguf(init_from)
        arrays = llama_tensors(file, llama_config(file))
        return {name: torch.from_numpy(array) for name, array in arrays.items()}
    tensors = {}
    for path in weight_files(init_from):
        if not is_file(path):
            raise BadInput(f"{path} is no regular file; {REMEDY}")
        tensors |= checkpoint.read_tensors(path, REMEDY)
    return tensors


def read_weights(init_from, config):
    """Our name -> tensor of a pretrained model, as a GPT of `config` needs them. BadInput if its
    vocabulary or one of its tensors does not fit."""
    vocab_size = read_config(init_from).vocab_size
    if vocab_size != config.vocab_size:
        raise BadInput(f"--init_from={init_from} has a vocabulary of {vocab_size:,}, the data set "
                       f"one of {config.vocab_size:,}; choose a --dataset prepared with its "
                       f"tokenizer ({how_to_tokenize(init_from)})")
    left = {}
    for name, tensor in read_tensors(init_from).items():
        if not BUFFERS.search(name):
            left[name.removeprefix(PREFIX[config.arch])] = tensor
    check_tied_head(init_from, config, left)
    ours = {}
    for layer, theirs, transposed in layers(config):
        for kind in ("weight", "bias"):
            names = [f"{name}.{kind}" for name in theirs]
            if all(name in left for name in names):
                parts = [left.pop(name) for name in names]
                ours[f"{layer}.{kind}"] = stack(init_from, names, parts, transposed)
    if left:
        raise BadInput(f"{init_from}: no place for its tensors {first_few(sorted(left))} "
                       f"in arch {config.arch!r}")
    if "pos_embed.weight" in ours:
        ours["pos_embed.weight"] = ours["pos_embed.weight"][:config.block_size]
    return ours


def how_to_tokenize(init_from):
    """The command that prepares a text in the model's tokens, or where it brings no tokenizer, the
    data set in GPT-2's."""
    if is_gguf(init_from) or is_file(Path(init_from) / "tokenizer.json"):
        return f"python -m data.text --input FILE --name NAME --tokenizer={init_from}"
    return "GPT-2's: shakespeare"


def check_tokenizer(init_from, data):
    """BadInput if the data set's tokens mean something else than the pretrained model's, where it
    brings its tokenizer."""
    tokenizer = pretrained_tokenizer(init_from)
    if tokenizer and not same_tokens(tokenizer, data.tokenizer):
        raise BadInput(f"--init_from={init_from} has another tokenizer than data set {data.name}; "
                       "choose a --dataset prepared with its tokenizer "
                       f"({how_to_tokenize(init_from)})")


def check_tied_head(init_from, config, tensors):
    """Leaves out the head's weight where it is the embedding's, which some files hold twice.
    BadInput if it is another and config.json has the two tied."""
    if not config.tie_head:
        return
    head = tensors.pop("lm_head.weight", None)
    [embed] = OUTER_LAYERS[config.arch]["embed"]
    if head is not None and not torch.equal(head, tensors.get(f"{embed}.weight", head[:0])):
        raise BadInput(f"{init_from}: lm_head.weight is not {embed}.weight, but config.json has "
                       "tie_word_embeddings true, with which one of them would be lost; set it to "
                       "false there if the head is the model's, or take lm_head.weight out")


def stack(init_from, names, parts, transposed):
    """Their tensors as one of ours."""
    kinds = [f"{str(p.dtype).removeprefix('torch.')} {tuple(p.shape)}" for p in parts]
    wrong = f"{init_from}: {', '.join(names)}: {', '.join(kinds)}"
    if not all(p.is_floating_point() for p in parts):
        raise BadInput(f"{wrong}: quantised weights are not implemented here; convert them to "
                       "float32 or bfloat16")
    try:
        return torch.cat([p.t() if transposed else p for p in parts])
    except RuntimeError as error:
        raise BadInput(f"{wrong}: shapes that do not fit each other; {REMEDY}") from error


# Whose weights they are ---------------------------------------------------------------------------

def origin(config):
    """The pretrained model that a run's weights go back to, as its config.json (dict) and those of
    the runs before it name it; None if it began at random."""
    seen = set()
    name = config.get("init_from")
    while isinstance(name, str) and name not in seen:
        if is_pretrained(name) or not is_file(Path(name) / "config.json"):
            return name
        seen.add(name)
        name = read_json(Path(name) / "config.json", REMEDY).get("init_from")
    return None


def notices(init_from, trained):
    """name -> text of the files that a copy of a pretrained model's weights has to carry. trained:
    whether they were changed by training. Nothing is fetched for it."""
    path = smollm2_path() if init_from == "smollm2" else Path(init_from)
    changes = "trained further with nanomix" if trained else "otherwise unchanged"
    if not is_gguf(init_from) or not is_file(path):
        return {"NOTICE": f"These weights started from {init_from}, {changes}. Its licence holds "
                          "for them too.\n"}
    file = GGUF(path)
    told = [printable(str(file.values.get(f"general.{key}", "unknown"))[:200])
            for key in ("name", "organization", "license")]
    name, organization, licence = told
    kinds = sorted({info.quantisation for info in file.tensors.values()})
    files = {"NOTICE": (
        f"These weights are those of {name}, of {organization}, licence: {licence},\n"
        f"from {path.name}, sha256 {checkpoint.sha256(path)}.\n"
        f"Changes: dequantised from {', '.join(kinds)} to float32, {changes}.\n")}
    licence_path = path.with_name("LICENSE")
    if init_from == "smollm2" and is_file(licence_path):
        files["LICENSE"] = read_bytes(licence_path, 2**20, "remove it").decode(errors="replace")
    return files
