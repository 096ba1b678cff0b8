"""Samples text from a trained model. Run: python sample.py --out_dir=out/shakespeare_pelican --start="ROMEO:"   (seconds)

Reads the run folder and nothing else. Each token costs one step on top of the model's state, whatever came before;
only a model with learned positions reads its last half block again whenever it reaches block_size.
"""
import base.errors  # noqa: F401  before all others: Ctrl-C ends these quietly
import codecs
import sys
import time
from typing import Literal, Optional

import torch

from base.command_line import parse_options
from base.errors import BadInput, exit_on_bad_input
from base.options import checked, option
from data.tokenizer import read_prompt
from mixers import load_mixer_file
from training import checkpoint
from training.device import choose_device, choose_dtype, ready_to_decode


@checked
class SampleOptions:
    out_dir: str = option("", "the run's folder")
    checkpoint: str = option("newest", "newest, best, or the name of a folder in out_dir/checkpoints")
    start: Optional[str] = option(None, "the prompt, or FILE:path to read it from [default: a line break]")
    num_samples: int = option(3, "how many samples to draw", ge=1)
    max_new_tokens: int = option(500, "tokens in each", ge=1)
    temperature: float = option(0.8, "divides the logits; 0 always takes the likeliest token", ge=0)
    top_k: Optional[int] = option(None, "draw among the k likeliest tokens only [default: all]", ge=1)
    seed: int = option(1337, "of the random choices", ge=0, lt=2**63)
    device: str = option("auto", "cpu, cuda, cuda:1, mps, or auto: the best there is")
    dtype: Literal["auto", "float32", "bfloat16"] = option("auto", "of the heavy operations; auto: bfloat16 where it is fast")
    mixer_file: Optional[str] = option(None, "the Python file of the mixer, if the run was trained with one")


@exit_on_bad_input("sample.py")
def main():
    options, *_ = parse_options(SampleOptions, sys.argv[1:], __doc__.splitlines()[0], with_config_file=False)
    if not options.out_dir:
        raise BadInput("which run? name its folder: --out_dir=out/shakespeare_pelican")
    if options.mixer_file:
        load_mixer_file(options.mixer_file)
    device = choose_device(options.device)
    run = checkpoint.load(options.out_dir, options.checkpoint)
    model = checkpoint.build_model(run).to(device)
    dtype = choose_dtype(options.dtype, device, model.config.n_embd)
    ready_to_decode(model, dtype)
    prompt = torch.tensor([read_prompt(options.start, run.tokenizer)]).to(device)
    generator = torch.Generator(device).manual_seed(options.seed)
    started, drawn = time.perf_counter(), 0
    with torch.inference_mode(), torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
        for _ in range(options.num_samples):
            # a character may span several tokens, so bytes are decoded as they come
            decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
            write = lambda ids, final=False: print(decoder.decode(run.tokenizer.decode_bytes(ids), final), end="", flush=True)
            write(prompt[0].tolist())
            for token in model.stream(prompt, options.max_new_tokens, options.temperature, options.top_k, generator):
                write(token[0].tolist())
                drawn += 1
            write([], final=True)
            print("\n---------------")
    seconds = time.perf_counter() - started
    print(f"{drawn} tokens in {seconds:.2f} s: {drawn / seconds:,.0f} tokens/s", file=sys.stderr)


if __name__ == "__main__":
    main()
