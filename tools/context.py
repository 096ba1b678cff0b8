"""Does a model use its context? The loss of the same tokens behind less and more of the text.

Run: python -m tools.context out/sweeps/books_small      (half a minute a run)

A sweep's or claim's folder whose runs kept their checkpoints (--keep_checkpoints); other folders
have the figures only. Stretches of STRETCH tokens of the validation text are predicted from windows
of C tokens that end with them, for each C of --contexts. Of a window the last quarter counts, at
most a stretch, so that a token has three quarters of C to C tokens before it; shorter windows stand
closer, so that the tokens are the same for every C. Longer windows than trained on are another
question than shorter ones, and learned positions have no answer to it. The AGAIN tokens that end
with a stretch are also read twice: whoever can copy knows the stretch the second time.

context.json in the folder holds the losses by run, of each author or of BLOCKS equal parts of the
text, and is read on the next call: copied to results/<name> beside the records it needs no
checkpoint. Prints, in bits per byte, means over seeds and blocks: the loss of each arm and C; what
it has gained over the shortest C; its difference from the baseline at the same C, with the words
of tools/verdicts.py; and a table of the second reading. All intervals of a table share one error.
"""
import base.errors  # noqa: F401  before all others: Ctrl-C ends these quietly
import math
import sys
from pathlib import Path
from typing import Annotated, Optional

import numpy as np
import torch
from pydantic import Field
from tqdm import tqdm

from base.command_line import paths_and_options
from base.errors import BadInput, exit_on_bad_input, printable
from base.files import exists, read_json, write_json
from base.options import checked, option
from mixers import load_mixer_file
from tools.compare import baseline_of, records_to_compare
from tools.compare_arms import arms_of, seed_of
from tools.passkey import lengths_of
from tools.records import holds_run
from tools.score import Lenient, Measured, load_scored, mean_by_author, token_losses
from tools.verdicts import MARGIN_BPB, in_words, judge
from training.device import choose_device

STRETCH = 64            # tokens
AGAIN = 2 * STRETCH     # tokens that are read twice
BLOCKS = 16             # of a text whose authors are not known
TOKENS_AT_ONCE = 2**14  # in one pass of a model
REMEDY = "move it away, and tools.context measures anew"


@checked
class ContextOptions:
    contexts: str = option("64,256,512,2048,4096", "tokens that a window has, from few to many")
    targets: int = option(2**14, "tokens that are predicted, whole stretches of 64", ge=STRETCH)
    baseline: Optional[str] = option(
        None, "what the others are compared with [default: softmax, or the first]")
    mixer_file: str = option("", "the Python file of the mixer, if a run was trained with one")
    device: str = option("auto", "cpu, cuda, cuda:1, mps, or auto: the best there is")


# context.json ---------------------------------------------------------------------------------

Losses = Annotated[list[Measured], Field(min_length=1, max_length=10_000)]


class Run(Lenient):
    weights: Optional[str]                 # the checksum of what was measured
    losses: list[Optional[Losses]]         # nats, for each of the contexts; None: it has no answer
    # of the first and the second
    readings: Optional[Annotated[list[Losses], Field(min_length=2, max_length=2)]]


class Content(Lenient):
    contexts: Annotated[list[Annotated[int, Field(ge=8)]], Field(min_length=2)]
    targets: Annotated[int, Field(ge=STRETCH)]
    bytes_per_token: Annotated[float, Field(gt=0, le=1e30)]
    runs: dict[str, Run]


def read_context(path, options, given):
    """The content of a context.json (dict), with no runs if it is not there; what was not `given`
    is as it stands there. BadInput if it is damaged, or of other windows than were asked for."""
    contexts = lengths_of(options.contexts, "--contexts")
    if sorted(set(contexts)) != contexts or len(contexts) < 2 or contexts[0] < 8:
        raise BadInput(f"--contexts={options.contexts}: from few to many, two or more, and 8 "
                       "tokens at least")
    asked = {"contexts": contexts, "targets": options.targets // STRETCH * STRETCH}
    if not exists(path):
        return asked | {"bytes_per_token": None, "runs": {}}
    content = read_json(path, REMEDY, Content).model_dump()
    for name in sorted(given & asked.keys()):
        if content[name] != asked[name]:
            raise BadInput(f"{path} has other {name} than --{name}={getattr(options, name)}; "
                           f"leave that out, or {REMEDY}")
    blocks = set()
    for name, run in content["runs"].items():
        if len(run["losses"]) != len(content["contexts"]):
            raise BadInput(f"{path} is damaged: {name} has {len(run['losses'])} losses for "
                           f"{len(content['contexts'])} contexts; {REMEDY}")
        blocks |= {len(losses) for losses in (*run["losses"], *(run["readings"] or ())) if losses}
    if len(blocks) > 1:
        raise BadInput(f"{path} is damaged: it has losses of {sorted(blocks)} blocks; {REMEDY}")
    return content


# Measuring ------------------------------------------------------------------------------------

def counted(C):
    """How many tokens at the end of a window of C count: a power of two, so that they divide
    STRETCH."""
    return min(STRETCH, 2**int(math.log2(C // 4)))


def stretch_ends(n_tokens, contexts, targets):
    """Where the stretches end, (N,): before token number e, spread over a text of n_tokens, the
    first after the longest window. BadInput if the text is too short."""
    first = max(*contexts, AGAIN) + STRETCH
    N = targets // STRETCH
    if n_tokens < first + N * STRETCH:
        raise BadInput(f"the validation text has {n_tokens:,} tokens, too few for windows of "
                       f"{first - STRETCH:,} before {targets:,} targets; choose less of either")
    return np.linspace(first, n_tokens, N).astype(int)


@torch.no_grad()
def losses_at_end(scored, windows, size):
    """The loss in nats of the last `size` tokens of windows (n, T + 1), T >= size: (n, size)."""
    model = scored.model
    device = next(model.parameters()).device
    T = windows.size(1) - 1
    losses = []
    for some in windows.split(max(1, TOKENS_AT_ONCE // T)):
        some = some.to(device)
        with scored.autocast:
            h, _ = model.hidden(some[:, :-1])
            logits = model.head(h[:, -size:])
        losses.append(token_losses(logits, some[:, -size:]).double().cpu())
    return torch.cat(losses)


def reaches(scored, T):
    """Whether the model's positions reach over T tokens."""
    return scored.options.pos != "learned" or T <= scored.options.block_size


def text_of(scored):
    return torch.from_numpy(scored.data.val.astype(np.int64))


def losses_behind(scored, C, ends):
    """The mean loss in nats of each stretch, (N,), behind windows of C tokens; None if the model's
    positions do not reach so far."""
    if not reaches(scored, C):
        return None
    size = counted(C)
    stops = torch.from_numpy((ends[:, None] - np.arange(0, STRETCH, size)).ravel())
    windows = text_of(scored)[stops[:, None] + torch.arange(-C - 1, 0)]
    return losses_at_end(scored, windows, size).view(len(ends), -1).mean(1).numpy()


def losses_of_readings(scored, ends):
    """The mean loss in nats of each stretch, (N,), within the AGAIN tokens that end with it, and
    the same when these are read a second time; None if the model's positions do not reach."""
    if not reaches(scored, 2 * AGAIN):
        return None
    once = text_of(scored)[torch.from_numpy(ends)[:, None] + torch.arange(-AGAIN, 0)]
    return [losses_at_end(scored, once.repeat(1, times), STRETCH).mean(1).numpy()
            for times in (1, 2)]


def by_block(losses, ends, data):
    """The mean, in nats, for each author of a stretch's middle, or for BLOCKS parts of the text."""
    authors = data.val_authors(ends - STRETCH // 2)
    if authors is None:
        return [float(part.mean()) for part in np.array_split(losses, min(BLOCKS, len(losses)))]
    return list(mean_by_author(authors, losses).values())


def measure(record, content, device):
    """Adds to the content what a run's newest checkpoint says. BadInput if it has none, or is of a
    recall task."""
    if not holds_run(record.source) or not exists(Path(record.source) / "checkpoints"):
        raise BadInput(f"{record} has no checkpoint and no figures in context.json; train it with "
                       "--keep_checkpoints")
    scored = load_scored(record.source, device)
    if not scored.is_text:
        raise BadInput(f"{record} is of a recall task, which has no windows; name runs on a text")
    ends = stretch_ends(len(scored.data.val), content["contexts"], content["targets"])
    losses = []
    for C in content["contexts"]:
        of_stretches = losses_behind(scored, C, ends)
        losses.append(None if of_stretches is None else by_block(of_stretches, ends, scored.data))
    readings = losses_of_readings(scored, ends)
    if readings is not None:
        readings = [by_block(of_stretches, ends, scored.data) for of_stretches in readings]
    content["bytes_per_token"] = scored.data.bytes_per_token
    content["runs"][record.name] = {
        "weights": scored.weights, "losses": losses, "readings": readings}


# Telling --------------------------------------------------------------------------------------

def losses_of(arm, content, i):
    """{seed: losses by block, in nats} of an arm at the i-th context; None if it has no answer."""
    losses = {seed_of(record): content["runs"][record.name]["losses"][i] for record in arm.records}
    return None if None in losses.values() else losses


def tables(arms, content, baseline):
    """The lines to print."""
    contexts = content["contexts"]
    bits = 1 / math.log(2) / content["bytes_per_token"]  # per byte, of nats per token
    at = {arm.label: [losses_of(arm, content, i) for i in range(len(contexts))] for arm in arms}

    def loss(label, i):
        return f"{np.mean(list(at[label][i].values())) * bits:.4f}"

    def gained(label, i):
        pair = {"more": at[label][i], "less": at[label][0]}
        n = len(arms) * (len(contexts) - 1)
        return interval_in_words(judge(pair, "less", None, n)["more"], bits)

    def apart(label, i):
        if label == baseline or at[baseline][i] is None:
            return ""
        pair = {"arm": at[label][i], "baseline": at[baseline][i]}
        n = max(1, len(arms) - 1) * len(contexts)
        verdict = judge(pair, "baseline", MARGIN_BPB / bits, n)["arm"]
        return f"{interval_in_words(verdict, bits)} {in_words(verdict)}"

    lines = []
    for title, first, cell in (("bits per byte behind", 0, loss),
                               (f"minus the same behind {contexts[0]}", 1, gained),
                               (f"minus {printable(baseline)} behind", 0, apart)):
        columns = range(first, len(contexts))
        lines += [f"| {title} | " + " | ".join(f"{contexts[i]:,}" for i in columns) + " |",
                  "|---|" + "---|" * len(columns)]
        for arm in arms:
            cells = ["n/a" if at[arm.label][i] is None else cell(arm.label, i) for i in columns]
            if any(cells):
                lines.append(f"| {printable(arm.label)} | " + " | ".join(cells) + " |")
        lines.append("")
    of_readings = reading_table(arms, content, baseline, bits)
    return lines + of_readings if of_readings else lines[:-1]


def reading_table(arms, content, baseline, bits):
    """The lines of what a second reading gives, none where no arm has an answer; bits: per byte, of
    nats per token."""
    readings = {}
    for arm in arms:
        of_seeds = {seed_of(record): content["runs"][record.name]["readings"]
                    for record in arm.records}
        if None not in of_seeds.values():
            readings[arm.label] = [{seed: of_seeds[seed][i] for seed in of_seeds} for i in (0, 1)]
    n = max(1, 2 * len(readings) - 1)  # intervals
    lines = [f"| {AGAIN} tokens read twice | once | again | gained | minus "
             f"{printable(baseline)}, again |", "|---|---|---|---|---|"]
    for label, (once, again) in readings.items():
        gained = judge({"again": again, "once": once}, "once", None, n)["again"]
        apart = ""
        if label != baseline and baseline in readings:
            pair = {"arm": again, "baseline": readings[baseline][1]}
            verdict = judge(pair, "baseline", MARGIN_BPB / bits, n)["arm"]
            apart = f"{interval_in_words(verdict, bits)} {in_words(verdict)}"
        cells = [f"{np.mean(list(losses.values())) * bits:.4f}" for losses in (once, again)]
        lines.append(f"| {printable(label)} | " + " | ".join(
            [*cells, interval_in_words(gained, bits), apart]) + " |")
    return lines if readings else []


def interval_in_words(verdict, bits):
    text = f"{verdict.difference * bits:+.4f}"
    if verdict.difference_low is None:
        return text
    low, high = verdict.difference_low * bits, verdict.difference_high * bits
    return f"{text} [{low:+.4f}, {high:+.4f}]"


@exit_on_bad_input("tools.context")
def main():
    names, options, given = paths_and_options(ContextOptions, sys.argv[1:], __doc__.splitlines()[0])
    if len(names) != 1:
        raise BadInput("name one folder, a sweep's or a claim's: python -m tools.context "
                       "out/sweeps/books_small")
    if options.mixer_file:
        load_mixer_file(options.mixer_file)
    device = choose_device(options.device)
    path = Path(names[0]) / "context.json"
    content = read_context(path, options, given)
    records = records_to_compare(names, device)
    arms = arms_of(records)
    baseline = baseline_of(options, arms)
    missing = [record for record in records if not is_known(record, content)]
    for record in tqdm(missing, unit="run", disable=not sys.stderr.isatty()):
        measure(record, content, device)
        write_json(path, content)
    print("\n".join(tables(arms, content, baseline)))


def is_known(record, content):
    """Whether the content has a run's figures, of these weights."""
    run = content["runs"].get(record.name)
    return run is not None and run["weights"] == record.scores.get("weights")


if __name__ == "__main__":
    main()
