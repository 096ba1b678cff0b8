"""Writes a run, or a GGUF as it came, as a Hugging Face folder, in seconds.

    python -m tools.export_hf --out_dir=out/shakespeare_softmax --to=out/hf
    python -m tools.export_hf --init_from=smollm2 --to=out/smollm2_hf
    AutoModelForCausalLM.from_pretrained("out/hf")   transformers' GPT-2 or LLaMA, the same logits

BPE goes with it as transformers' tokenizer files; for characters and bytes transformers has none.
Only attention by softmax can be said in these formats. A head temperature and a factorised
embedding are multiplied in. Where weights started from a pretrained model, a NOTICE says so.
"""
import base.errors  # noqa: F401  before all others: Ctrl-C ends these quietly
import json
import os
import shutil
import sys
import uuid
from pathlib import Path
from typing import Any, NamedTuple, Optional

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from base.command_line import parse_options
from base.errors import BadInput, exit_on_bad_input
from base.files import exists, sync, writing
from base.options import checked, option
from data.named_tokenizer import pretrained_tokenizer
from data.tokenizer import (
    END_OF_TEXT, BPETokenizer, CharTokenizer, GPT2Tokenizer, printable_bytes)
from mixers import layer_mixers
from model import GPT, model_config
from training import checkpoint, pretrained
from training.pretrained import ACTIVATION_FIELD, ACTIVATIONS, FIELDS, PREFIX, layers


@checked
class ExportOptions:
    out_dir: str = option("", "the run's folder")
    checkpoint: str = option("newest", "newest, best, or the name of a folder in "
                                       "out_dir/checkpoints")
    init_from: str = option("", "in place of a run: smollm2 or the path of a .gguf")
    to: str = option("", "the folder to write, which must not exist or be empty")


def check_expressible(config):
    """BadInput naming the option that transformers' GPT-2 or LLaMA does not have."""
    if set(layer_mixers(config.mixer, config.n_layer)) != {"softmax"}:
        raise BadInput(f"mixer {config.mixer!r} has no counterpart in transformers; "
                       "only softmax can be exported")
    needed = {"pos": ["rope"], "norm": ["rms"]}
    if config.arch == "gpt2":
        needed = {"pos": ["learned"], "norm": ["layer"], "n_kv_head": [config.n_head]}
    needed |= {"conv": [None, 0], "attn_temperature": [1.0]}
    for name, values in needed.items():
        if getattr(config, name) not in values:
            raise BadInput(f"{name} {getattr(config, name)!r} has no counterpart in transformers' "
                           f"{config.arch}, whose {name} is {values[0]!r}")
    have = sorted(set(ACTIVATIONS.values()))
    if config.mlp_activation not in have:
        raise BadInput(f"mlp_activation {config.mlp_activation!r} has no counterpart in "
                       f"transformers; have {', '.join(have)}")


def hf_config(config, ends):
    """The content of config.json; ends: the ids of the tokens before and behind a text, or
    None."""
    values = {name: getattr(config, ours) for name, ours in FIELDS[config.arch].items()}
    name_of = {ours: theirs for theirs, ours in reversed(ACTIVATIONS.items())}
    values[ACTIVATION_FIELD[config.arch]] = name_of[config.mlp_activation]
    values["model_type"] = config.arch
    values["bos_token_id"], values["eos_token_id"] = ends
    values["dtype"] = "float32"
    if config.arch == "gpt2":
        values["architectures"] = ["GPT2LMHeadModel"]
        values["embd_pdrop"] = config.dropout
        values["resid_pdrop"] = config.dropout
        values["attn_pdrop"] = 0.0
    else:
        values["architectures"] = ["LlamaForCausalLM"]
        values["rope_theta"] = config.rope_base  # for transformers 4, and for 5:
        values["rope_parameters"] = {"rope_type": "default", "rope_theta": config.rope_base}
    return values


def hf_tensors(model):
    """Hugging Face's name -> tensor."""
    config = model.config
    ours = checkpoint.model_tensors(model)
    if config.embed_rank:
        ours["embed.weight"] = ours.pop("embed.0.weight") @ ours.pop("embed.1.weight").T
    for name in ("norm.weight", "norm.bias"):  # the head reads norm(h) / temperature
        if name in ours:
            ours[name] = ours[name] / config.head_temperature
    H, G, D = model.blocks[0].mixer.c_attn.sizes
    tensors = {}
    for layer, names, transposed in layers(config):
        weight = ours[f"{layer}.weight"]
        bias = ours.get(f"{layer}.bias")
        if bias is None and config.arch == "gpt2" and layer not in ("embed", "pos_embed", "head"):
            bias = weight.new_zeros(len(weight))  # GPT-2 always has one
        rows = len(weight) // len(names)
        if len(names) == 3:
            rows = [H * D, G * D, G * D]  # queries, keys, values
        prefix = "" if layer == "head" else PREFIX[config.arch]
        for kind, tensor in (("weight", weight), ("bias", bias)):
            if tensor is None:
                continue
            for name, part in zip(names, tensor.split(rows)):
                part = part.t() if transposed else part
                tensors[f"{prefix}{name}.{kind}"] = part.contiguous().clone()
    return tensors


def bpe_merges(tokens):
    """The merges (left, right) that made each token after the single bytes, in order: a token's
    bytes, merged by the earlier merges alone, are two tokens."""
    rank = {token: i for i, token in enumerate(tokens)}
    for i, token in enumerate(tokens[256:], 256):
        parts = [token[j:j + 1] for j in range(len(token))]
        while len(parts) > 2:
            ranks = [rank.get(left + right, i) for left, right in zip(parts, parts[1:])]
            first = ranks.index(min(ranks))
            parts[first:first + 2] = [parts[first] + parts[first + 1]]
        yield parts


def tokenizer_files(tokenizer):
    """name -> text of the files from which transformers builds the tokenizer; none where it has no
    such."""
    if isinstance(tokenizer, BPETokenizer):
        return {"tokenizer.json": json.dumps(tokenizer.file, ensure_ascii=False),
                "tokenizer_config.json": json.dumps({"tokenizer_class": "PreTrainedTokenizerFast"})}
    return gpt2_files(tokenizer) if isinstance(tokenizer, GPT2Tokenizer) else {}


def gpt2_files(tokenizer):
    letter = printable_bytes()

    def spell(token):
        return "".join(letter[b] for b in token)

    vocabulary = {spell(token): i for i, token in enumerate(tokenizer.tokens)}
    merges = ["#version: 0.2"]
    for left, right in bpe_merges(tokenizer.tokens):
        merges.append(f"{spell(left)} {spell(right)}")
    return {
        "vocab.json": json.dumps(vocabulary | tokenizer.special_tokens, ensure_ascii=False),
        "merges.txt": "\n".join(merges) + "\n",
        "tokenizer_config.json": json.dumps({"tokenizer_class": "GPT2Tokenizer"}),
    }


def refuse_used(to):
    """BadInput if there is something at `to` that is no empty folder."""
    if to.is_symlink():
        raise BadInput(f"--to={to} is a link; name the folder itself")
    if exists(to) and not (to.is_dir() and not any(to.iterdir())):
        raise BadInput(f"--to={to} already exists; choose another folder or delete it")


def write_folder(to, files, tensors):
    """Writes texts (name -> text) and model.safetensors aside, then renames: the folder `to` is
    whole or absent."""
    aside = to.with_name(f".{to.name}.{uuid.uuid4().hex}.tmp")
    try:
        aside.mkdir(parents=True)
        for name, text in files.items():
            (aside / name).write_text(text, encoding="utf-8")
        save_file(tensors, aside / "model.safetensors", metadata={"format": "pt"})
        for path in (*aside.iterdir(), aside):
            sync(path)
        os.replace(aside, to)  # goes through for an empty folder at `to`, for no other
    except (OSError, SafetensorError) as error:
        raise BadInput(f"cannot write --to={to}: {error}; free space or choose another folder") \
            from error
    finally:
        shutil.rmtree(aside, ignore_errors=True)


class Source(NamedTuple):
    """What is written: a run or a GGUF."""
    path: str | Path
    model: GPT
    tokenizer: Any              # None: a GGUF without one
    ends: tuple[Any, Any]       # ids of the tokens before and behind a text, or None
    origin: Optional[str]       # the pretrained model that the weights go back to


def read_run(options):
    run = checkpoint.load(options.out_dir, options.checkpoint)
    check_expressible(model_config(run.config, run.folder / "config.json"))
    end = getattr(run.tokenizer, "special_tokens", {}).get(END_OF_TEXT)
    return Source(run.folder, checkpoint.build_model(run), run.tokenizer, (end, end),
                  pretrained.origin(run.config))


def read_gguf(init_from):
    if not pretrained.is_gguf(init_from):
        raise BadInput(f"--init_from={init_from} is no GGUF; name smollm2 or a .gguf, or a run "
                       "with --out_dir")
    config = pretrained.read_config(init_from)
    model = GPT(config).eval()
    checkpoint.load_model(model, pretrained.read_weights(init_from, config), init_from)
    values = pretrained.open_gguf(init_from).values
    ends = tuple(values.get(f"tokenizer.ggml.{end}_token_id") for end in ("bos", "eos"))
    return Source(init_from, model, pretrained_tokenizer(init_from), ends, init_from)


@exit_on_bad_input("export_hf.py")
def main():
    options, *_ = parse_options(ExportOptions, sys.argv[1:], __doc__.splitlines()[0],
                                with_config_file=False)
    if not options.to or bool(options.out_dir) == bool(options.init_from):
        raise BadInput("which run, and where to? --out_dir=out/shakespeare_softmax --to=out/hf; "
                       "or which GGUF: --init_from=smollm2 --to=out/hf")
    to = Path(os.path.abspath(options.to))
    with writing(to):
        refuse_used(to)
    source = read_gguf(options.init_from) if options.init_from else read_run(options)
    files = tokenizer_files(source.tokenizer)
    if source.origin:
        files |= pretrained.notices(source.origin, trained=not options.init_from)
    config = hf_config(source.model.config, source.ends)
    files["config.json"] = json.dumps(config, indent=1) + "\n"
    with torch.no_grad():
        write_folder(to, files, hf_tensors(source.model))
    print(f"{source.path} -> {options.to}: {', '.join([*files, 'model.safetensors'])}")
    if isinstance(source.tokenizer, CharTokenizer):
        print("no tokenizer: transformers has none for characters; token i is character i of the "
              f"alphabet in {source.path}/tokenizer.json")


if __name__ == "__main__":
    main()
