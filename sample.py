"""Samples text from a trained model, in seconds.

    python sample.py --out_dir=out/shakespeare_pelican --start="ROMEO:"

Reads the run folder and nothing else; with --compile also what it has compiled before. Each token
costs one step on top of the model's state, whatever came before; only a model with learned
positions reads its last half block again whenever it reaches block_size.
"""
import base.errors  # noqa: F401  before all others: Ctrl-C ends these quietly
import codecs
import sys
import time
from typing import Literal, Optional

import torch

from base.command_line import parse_options
from base.errors import BadInput, exit_on_bad_input, first_few, printable
from base.options import checked, option
from data.tokenizer import read_prompt
from mixers import load_mixer_file
from training import checkpoint
from training.compiled import compiled_step
from training.device import choose_device, choose_dtype, ready_to_decode


@checked
class SampleOptions:
    out_dir: str = option("", "the run's folder")
    checkpoint: str = option("newest", "newest, best, or the name of a folder in "
                                       "out_dir/checkpoints")
    start: Optional[str] = option(None, "the prompt, or FILE:path to read it from "
                                        "[default: a line break]")
    num_samples: int = option(3, "how many samples to draw", ge=1)
    max_new_tokens: int = option(500, "tokens in each", ge=1)
    temperature: float = option(0.8, "divides the logits; 0 always takes the likeliest token", ge=0)
    top_k: Optional[int] = option(None, "draw among the k likeliest tokens only [default: all]",
                                  ge=1)
    seed: int = option(1337, "of the random choices", ge=0, lt=2**63)
    device: str = option("auto", "cpu, cuda, cuda:1, mps, or auto: the best there is")
    dtype: Literal["auto", "float32", "bfloat16"] = option(
        "auto", "of the heavy operations; auto: bfloat16 where it is fast")
    mixer_file: Optional[str] = option(None, "the Python file of the mixer, if the run was trained "
                                             "with one")
    compile: bool = option(False, "compile a token's step for the CPU, 10 to 20 s the first time; "
                                  "kept in the user's cache, ~/.cache/nanomix")


def refuse_not_finite(run):
    """BadInput if a checkpoint has weights that are NaN or infinite: there is nothing to sample."""
    wrong = [name for name, tensor in run.model.items() if not tensor.isfinite().all()]
    if wrong:
        raise BadInput(f"{run.folder}: {first_few(wrong)} have values that are not finite; "
                       "choose another --checkpoint")


class Writer:
    """Writes tokens to standard output as they come. A character may span several tokens, so bytes
    are decoded piece by piece; a terminal is shown control characters and need not obey them."""

    def __init__(self, tokenizer):
        self.tokenizer = tokenizer
        self.decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self.escape = sys.stdout.isatty()

    def write(self, ids, final=False):
        text = self.decoder.decode(self.tokenizer.decode_bytes(ids), final)
        if self.escape:
            text = "".join(c if c in "\n\t" else printable(c) for c in text)
        print(text, end="", flush=True)


@exit_on_bad_input("sample.py")
def main():
    options, *_ = parse_options(SampleOptions, sys.argv[1:], __doc__.splitlines()[0],
                                with_config_file=False)
    if not options.out_dir:
        raise BadInput("which run? name its folder: --out_dir=out/shakespeare_pelican")
    if options.mixer_file:
        load_mixer_file(options.mixer_file)
    device = choose_device(options.device)
    run = checkpoint.load(options.out_dir, options.checkpoint)
    refuse_not_finite(run)
    model = checkpoint.build_model(run).to(device)
    dtype = choose_dtype(options.dtype, device, model.config.n_embd)
    one_token = compiled_step(model, dtype, batch=1) if options.compile else None
    ready_to_decode(model, dtype)
    prompt = torch.tensor([read_prompt(options.start, run.tokenizer)], device=device)
    generator = torch.Generator(device).manual_seed(options.seed)
    autocast = torch.autocast(device.type, dtype, enabled=dtype != torch.float32)
    drawn = 0
    started = time.perf_counter()
    with torch.inference_mode(), autocast:
        if not model.step(prompt[:, :1])[0].isfinite().all():
            raise BadInput(f"{run.folder}: the model's logits are not finite, its weights are too "
                           "large; choose another --checkpoint")
        for _ in range(options.num_samples):
            writer = Writer(run.tokenizer)
            writer.write(prompt[0].tolist())
            for token in model.stream(prompt, options.max_new_tokens, options.temperature,
                                      options.top_k, generator, one_token):
                writer.write(token[0].tolist())
                drawn += 1
            writer.write([], final=True)
            print("\n---------------")
    seconds = time.perf_counter() - started
    print(f"{drawn} tokens in {seconds:.2f} s: {drawn / seconds:,.0f} tokens/s", file=sys.stderr)


if __name__ == "__main__":
    main()
