"""Writes a run as a Hugging Face folder. Run: python -m tools.export_hf --out_dir=out/shakespeare_softmax --to=out/hf   (seconds)

    AutoModelForCausalLM.from_pretrained("out/hf")     transformers' GPT-2 or LLaMA, with the run's logits

GPT-2's BPE goes with it as transformers' tokenizer files; for characters transformers has none.
Only attention by softmax can be said in these formats. A head temperature and a factorised embedding are multiplied in.
"""
import base.errors  # noqa: F401  before all others: Ctrl-C ends these quietly
import json
import shutil
import sys
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from base.command_line import parse_options
from base.errors import BadInput, exit_on_bad_input
from base.options import checked, option
from data.tokenizer import GPT2Tokenizer, printable_bytes
from mixers import layer_mixers
from model import model_config
from training import checkpoint
from training.pretrained import ACTIVATIONS, FIELDS, PREFIX, layers


@checked
class ExportOptions:
    out_dir: str = option("", "the run's folder")
    checkpoint: str = option("newest", "newest, best, or the name of a folder in out_dir/checkpoints")
    to: str = option("", "the folder to write, which must not exist or be empty")


def check_expressible(config):
    """BadInput naming the option that transformers' GPT-2 or LLaMA does not have."""
    odd = {name for name in layer_mixers(config.mixer, config.n_layer) if name != "softmax"}
    if odd:
        raise BadInput(f"mixer {config.mixer!r} has no counterpart in transformers; only softmax can be exported")
    needed = {"pos": "learned" if config.arch == "gpt2" else "rope"} | ({"n_kv_head": config.n_head} if config.arch == "gpt2" else {})
    for name, value in needed.items():
        if getattr(config, name) != value:
            raise BadInput(f"{name} {getattr(config, name)!r} has no counterpart in transformers' {config.arch}, whose {name} is {value!r}")
    if config.mlp_activation not in ACTIVATIONS.values():
        have = ", ".join(sorted(set(ACTIVATIONS.values())))
        raise BadInput(f"mlp_activation {config.mlp_activation!r} has no counterpart in transformers; have {have}")


def hf_config(config, end_of_text):
    """The content of config.json; end_of_text: a token's id or None."""
    values = {name: getattr(config, ours) for name, ours in FIELDS[config.arch].items()}
    activation = "activation_function" if config.arch == "gpt2" else "hidden_act"
    values[activation] = next(name for name, ours in ACTIVATIONS.items() if ours == config.mlp_activation)
    special = {"bos_token_id": end_of_text, "eos_token_id": end_of_text, "dtype": "float32"}
    if config.arch == "gpt2":
        dropout = dict.fromkeys(["embd_pdrop", "resid_pdrop"], config.dropout) | {"attn_pdrop": 0.0}
        return {"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"], **values, **dropout, **special}
    # the base of RoPE for transformers 4 and 5
    rope = {"rope_theta": config.rope_base, "rope_parameters": {"rope_type": "default", "rope_theta": config.rope_base}}
    return {"model_type": "llama", "architectures": ["LlamaForCausalLM"], **values, **rope, **special}


def hf_tensors(model):
    """Hugging Face's name -> tensor."""
    config, ours = model.config, checkpoint.model_tensors(model)
    if config.embed_rank:
        ours["embed.weight"] = ours.pop("embed.0.weight") @ ours.pop("embed.1.weight").T
    for name in ours.keys() & {"norm.weight", "norm.bias"}:  # the head reads norm(h) / temperature
        ours[name] = ours[name] / config.head_temperature
    H, G, D = model.blocks[0].mixer.c_attn.sizes
    tensors = {}
    for layer, names, transposed in layers(config):
        weight, bias = ours[f"{layer}.weight"], ours.get(f"{layer}.bias")
        if bias is None and config.arch == "gpt2" and layer not in ("embed", "pos_embed", "head"):  # GPT-2 always has one
            bias = weight.new_zeros(len(weight))
        rows = [H * D, G * D, G * D] if len(names) == 3 else len(weight) // len(names)  # queries, keys, values
        for kind, tensor in (("weight", weight), ("bias", bias)):
            for name, part in zip(names, tensor.split(rows) if tensor is not None else ()):
                full = name if layer == "head" else PREFIX[config.arch] + name
                tensors[f"{full}.{kind}"] = (part.t() if transposed else part).contiguous().clone()
    return tensors


def bpe_merges(tokens):
    """The merges (left, right) that made each token after the single bytes, in order: a token's bytes, merged by the earlier
    merges alone, are two tokens."""
    rank = {token: i for i, token in enumerate(tokens)}
    for i, token in enumerate(tokens[256:], 256):
        parts = [token[j:j + 1] for j in range(len(token))]
        while len(parts) > 2:
            best = min(range(len(parts) - 1), key=lambda j: rank.get(parts[j] + parts[j + 1], i))
            parts[best:best + 2] = [parts[best] + parts[best + 1]]
        yield parts


def tokenizer_files(tokenizer):
    """name -> text of the files from which transformers builds GPT-2's tokenizer."""
    letter = printable_bytes()
    spell = lambda token: "".join(letter[b] for b in token)
    vocabulary = {spell(token): i for i, token in enumerate(tokenizer.tokens)} | tokenizer.special_tokens
    merges = ["#version: 0.2", *(" ".join(map(spell, pair)) for pair in bpe_merges(tokenizer.tokens))]
    return {"vocab.json": json.dumps(vocabulary, ensure_ascii=False), "merges.txt": "\n".join(merges) + "\n",
            "tokenizer_config.json": json.dumps({"tokenizer_class": "GPT2Tokenizer"})}


@exit_on_bad_input("export_hf.py")
def main():
    options, *_ = parse_options(ExportOptions, sys.argv[1:], __doc__.splitlines()[0], with_config_file=False)
    if not options.out_dir or not options.to:
        raise BadInput("which run, and where to? --out_dir=out/shakespeare_softmax --to=out/hf")
    to = Path(options.to)
    if to.exists() and not (to.is_dir() and not any(to.iterdir())):
        raise BadInput(f"--to={to} already exists; choose another folder or delete it")
    run = checkpoint.load(options.out_dir, options.checkpoint)
    config = model_config(run.config, run.folder / "config.json")
    check_expressible(config)
    model = checkpoint.build_model(run)
    is_bpe = isinstance(run.tokenizer, GPT2Tokenizer)
    end_of_text = run.tokenizer.special_tokens.get("<|endoftext|>") if is_bpe else None
    files = {"config.json": json.dumps(hf_config(config, end_of_text), indent=1) + "\n"} | (tokenizer_files(run.tokenizer) if is_bpe else {})
    aside = to.with_name(f".{to.name}.new")
    try:
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir(parents=True)
        for name, text in files.items():
            (aside / name).write_text(text, encoding="utf-8")
        with torch.no_grad():
            save_file(hf_tensors(model), aside / "model.safetensors", metadata={"format": "pt"})
        aside.replace(to)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(aside, ignore_errors=True)
        raise BadInput(f"cannot write --to={to}: {error}; free space or choose another folder") from error
    print(f"{run.folder} -> {to}: {', '.join([*files, 'model.safetensors'])}")
    if not is_bpe:
        print(f"no tokenizer: transformers has none for characters; token i is character i of the alphabet in {run.folder / 'tokenizer.json'}")


if __name__ == "__main__":
    main()
