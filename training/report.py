"""What a run prints before its first step and after its last one."""
import math
import shlex
import sys

import torch

from base.errors import printable
from base.terminal import wrapped
from data.tokenizer import read_prompt
from mixers import layer_mixers

SAMPLE_CHARACTERS = 100  # of the text that a finished run shows


def describe(options, model, data, machine):
    """The run's folder, machine and data, a table of parameters that adds up, the mixers' costs."""
    groups = model.parameter_groups()
    total = sum(p.numel() for p in model.parameters())
    assert total == sum(groups.values()), groups
    where = machine.device.type
    if where == "cpu":
        where += f", {torch.get_num_threads()} threads"
    if machine.world.size > 1:
        where += f", {machine.world.size} processes ({options.parallel})"
    print(f"{options.out_dir}: {options.mixer}, {options.arch}, on {where}, {options.dtype}")
    print(wrapped(f"data       {data.name}: {data.size()}, vocabulary {data.vocab_size:,}"))
    for group, count in groups.items():
        print(f"{group:10} {count:>12,} parameters {100 * count / total:5.1f} %")
    print(f"{'all':10} {total:>12,} parameters")
    T, costs = options.block_size, costs_of(options, model)
    flops, state = costs["flops_per_token"], costs["state_bytes"]
    flops = "n/a" if flops is None else f"{flops:,.0f} forward FLOPs"
    state = "n/a" if state is None else f"{state:,.0f} bytes"
    print(wrapped(f"cost       {flops} per token of {T}, a multiply-add being 2; "
                  f"{state} of state after {T} tokens"), flush=True)
    if 0 < options.max_iters <= options.warmup_iters and not options.eval_only:
        print(wrapped(
            f"warning    the warm-up outlasts the run: of {options.max_iters:,} steps "
            f"{options.warmup_iters:,} raise the learning rate, it never gets to "
            f"{options.learning_rate:g}; lower --warmup_iters"), flush=True)


def costs_of(options, model):
    """{name: number} of what a model takes, over block_size tokens; None where a mixer does not
    say."""
    T = options.block_size
    return {"parameters": sum(p.numel() for p in model.parameters()),
            "state_bytes": model.state_bytes(T, getattr(torch, options.dtype)),
            "flops_per_token": model.flops_per_token(T)}


def before_training(loss, options, vocab_size):
    """A line on the loss of the first batch, which no step has changed."""
    return (f"step {0:6}/{options.max_iters} | loss {loss:.4f} nats | "
            f"an even guess has {math.log(vocab_size):.4f}")


def show_result(options, model, data, machine):
    """Some text of the trained model, where the run is, and what to type next. Nothing here is part
    of the run, which is over and saved: it neither changes nor fails."""
    is_text = data.bytes_per_token is not None
    if is_text and machine.world.size == 1:
        try:
            print(f"\na sample:\n{sample_text(model, data, machine)}\n")
        except Exception as error:
            reason = " ".join(str(error).split())[:200]
            print(f"no sample: {type(error).__name__}: {reason}")
    print(f"the run is in {options.out_dir}")
    out_dir = f"--out_dir={shlex.quote(options.out_dir)}"
    if options.mixer_file:
        out_dir += f" --mixer_file={shlex.quote(options.mixer_file)}"
    if is_text:
        print(f"more text:   python sample.py {out_dir}")
    steps = 2 * options.max_iters or 1000
    print(f"more steps:  python train.py --resume {out_dir} --max_iters={steps}")
    print(f"its curves:  python -m tools.report {out_dir.removeprefix('--out_dir=')}")
    mixers = set(layer_mixers(options.mixer, options.n_layer))
    if mixers == {"pelican"} and data.name == "shakespeare_char":
        print("pelican sees one character at a time; a mixer that sees more:   "
              "python train.py configs/shakespeare.py")


@torch.no_grad()
def sample_text(model, data, machine):
    """About SAMPLE_CHARACTERS of text, always the same for the same weights, drawn by a generator
    of its own."""
    device = machine.device
    generator = torch.Generator(device).manual_seed(0)
    prompt = torch.tensor([read_prompt(None, data.tokenizer)], device=device)
    count = max(1, round(SAMPLE_CHARACTERS / data.bytes_per_token))
    ids = []
    model.eval()
    with machine.autocast:
        for token in model.stream(prompt, count, temperature=0.8, generator=generator):
            ids.append(token.item())
    text = data.tokenizer.decode(ids)
    if sys.stdout.isatty():
        text = "\n".join(printable(line) for line in text.split("\n"))
    return text
