"""Passkey retrieval in words: does a language model find a number again that a long text without
meaning has once (Mohtashami and Jaggi 2023, arXiv 2305.16300)?

    python -m tools.passkey --out_dir=out/smollm2_ssa --lengths=512,1024,2048,4096

    The grass is green. The sky is blue. .. The pass key is 50417. Remember it. 50417 is the pass
    key. The grass is green. .. What is the pass key? The pass key is

The key stands at depths that are evenly spread over the prompts. Right is an answer whose every
token is the likeliest one, which is what sampling at temperature 0 would write; beside it stands
the loss of its tokens, which moves earlier. Prints a line for each length. The model decides how
long: with RoPE any length, also beyond what it was trained on.
"""
import base.errors  # noqa: F401  before all others: Ctrl-C ends these quietly
import random
import sys
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F

from base.command_line import parse_options
from base.errors import BadInput, exit_on_bad_input
from base.options import checked, option
from data.tokenizer import BPETokenizer
from mixers import load_mixer_file
from tools.score import DTYPES, options_of
from training import checkpoint
from training.device import choose_device

START = "There is a pass key hidden in this text. Find it and remember it.\n"
FILLER = " The grass is green. The sky is blue. The sun is yellow. Here we go. There and back."
KEY = " The pass key is {key}. Remember it. {key} is the pass key."
QUESTION = "\nWhat is the pass key? The pass key is"
ANSWER = " {key}"


@checked
class PasskeyOptions:
    out_dir: str = option("", "the run's folder", min_length=1)
    lengths: str = option("512,1024,2048,4096", "lengths of the prompts in tokens")
    prompts: int = option(16, "prompts of each length", ge=1)
    seed: int = option(1, "of the keys", ge=0)
    device: str = option("auto", "cpu, cuda, cuda:1, mps, or auto: the best there is")
    mixer_file: str = option("", "the Python file of the mixer, if the run was trained with one")


class Prompt(NamedTuple):
    tokens: list  # with the answer
    answer: int   # how many of them are the answer's


class Recall(NamedTuple):
    right: float  # share of the prompts
    loss: float   # nats per token of the answers


def prompts(tokenizer, length, n, seed=1):
    """n Prompts of up to `length` tokens, which lack less than a round of the filler. BadInput if
    there is no room for any filler."""
    draw = random.Random(seed)
    keys = [str(draw.randrange(10_000, 100_000)) for _ in range(n)]
    texts = [START, FILLER, QUESTION, *(text.format(key=key) for key in keys
                                        for text in (KEY, ANSWER))]
    start, filler, question, *of_keys = encoded(tokenizer, texts)
    made = []
    for i in range(n):
        said, answer = of_keys[2 * i:2 * i + 2]
        rounds = (length - len(start + said + question + answer)) // len(filler)
        if rounds < 1:
            raise BadInput(f"--lengths: {length} tokens leave no room for a text around the key; "
                           "choose more")
        before = rounds * i // max(n - 1, 1)
        tokens = start + before * filler + said + (rounds - before) * filler + question + answer
        made.append(Prompt(tokens, len(answer)))
    return made


def encoded(tokenizer, texts):
    """The tokens of each text, lists; of a received tokenizer in one process."""
    if isinstance(tokenizer, BPETokenizer):
        return [ids.tolist() for ids in tokenizer.encode_documents(texts)]
    return [tokenizer.encode(text) for text in texts]


@torch.no_grad()
def recall(model, some):
    """The Recall of a model over a list of Prompts."""
    device = model.norm.weight.device
    right, losses = [], []
    for prompt in some:
        tokens = torch.tensor(prompt.tokens, device=device)
        h, _ = model.hidden(tokens[None, :-1])
        logits = model.head(h[0, -prompt.answer:]).float()
        due = tokens[-prompt.answer:]
        right.append(bool((logits.argmax(-1) == due).all()))
        losses.append(F.cross_entropy(logits, due).item())
    return Recall(sum(right) / len(right), sum(losses) / len(losses))


def lengths_of(text, name="--lengths"):
    """The numbers of an option. BadInput for one that is none."""
    entries = text.split(",")
    if not all(entry.isascii() and entry.isdecimal() and len(entry) < 10 for entry in entries):
        raise BadInput(f"{name}={text}: write whole numbers, 512,1024")
    return [int(entry) for entry in entries]


@exit_on_bad_input("tools.passkey")
def main():
    options, *_ = parse_options(PasskeyOptions, sys.argv[1:], __doc__.splitlines()[0],
                                with_config_file=False)
    if not options.out_dir:
        raise BadInput("which run? name its folder: --out_dir=out/smollm2_ssa")
    lengths = lengths_of(options.lengths)
    if options.mixer_file:
        load_mixer_file(options.mixer_file)
    device = choose_device(options.device)
    saved = checkpoint.load(options.out_dir)
    run = options_of(saved.config, saved.folder)
    if run.pos == "learned" and max(lengths) > run.block_size:
        raise BadInput(f"--lengths={options.lengths}: {Path(options.out_dir)} has learned "
                       f"positions for {run.block_size} tokens; choose less")
    dtype = DTYPES[run.dtype]
    model = checkpoint.build_model(saved).to(device)
    with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
        for length in lengths:
            some = prompts(saved.tokenizer, length, options.prompts, options.seed)
            found = recall(model, some)
            print(f"{length:>6} tokens: {found.right:.2f} of {len(some)} right | "
                  f"{found.loss:.3f} nats per token of the answer", flush=True)


if __name__ == "__main__":
    main()
