"""Is it better? Runs compared over their seeds, against a baseline.

Run: python -m tools.compare out/sweeps/shakespeare   (seconds)

    python -m tools.compare out/a out/b out/c --baseline=lln    any run folders; of a sweep those
                                                                with the chosen learning rates
    python -m tools.compare results/shakespeare                 records that --keep has written: no
                                                                weights needed

Prints a table and what was not equal between the mixers; writes out_dir/table.md, table.csv and

    verdicts.png   the loss of every seed, and the verdict
    loss.png       validation loss over steps, over training FLOPs and over time: median of the
                   seeds, and their range
    state.png      final loss over the bytes of state that decoding keeps after T tokens
    position.png   loss at each position of the context: falling as long as a mixer makes use of
                   more of it

Losses are those of the *report* data, which chose nothing (tools/score.py), at the last step: mean
over the seeds and its 95 % interval (Student's t). The verdict is Welch's t-test of the seeds'
losses against the baseline's, two-sided, the p values of all mixers adjusted by Holm's method:
*better* or *worse* below 0.05, otherwise *inside the seed noise*. It is about seeds alone: another
data set, size or number of steps may order them otherwise.
"""
import base.errors  # noqa: F401  before all others: Ctrl-C ends these quietly
import csv
import io
import os
import shutil
import sys
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from statistics import mean, median
from typing import Optional

import torch

from base.command_line import parse_options
from base.errors import BadInput, exit_on_bad_input, printable
from base.files import exists, read_json, write_file, write_json, writing
from base.options import checked, option
from mixers import has_effect, load_mixer_file
from model import GPT, model_config
from tools import compare_plots as plots
from tools.compare_arms import arms_of
from tools.compare_verdicts import interval, judge
from tools.records import REMEDY, contents_of, holds_run, is_records_file, read_records
from tools.records import read_sweep, scored_runs
from tools.score import DTYPES, scores_of
from training.device import choose_device
from training.metrics import start_wandb

LARGEST = 2**31  # parameters of a model that is built to be counted
WHAT_TO_NAME = "name run folders, or a sweep: python -m tools.compare out/sweeps/shakespeare"


@checked
class CompareOptions:
    baseline: Optional[str] = option(
        None, "what the others are tested against, as the table names it "
        "[default: softmax, or else the first by name]")
    out_dir: Optional[str] = option(
        None, "where table and plots go [default: <the first folder>/compare]", min_length=1)
    keep: Optional[str] = option(
        None, "write the runs' records (no weights) to this folder, which can be compared again",
        min_length=1)
    mixer_file: Optional[str] = option(
        None, "the Python file of the mixer, if a run was trained with one", min_length=1)
    device: str = option(
        "auto", "cpu, cuda, cuda:1, mps, or auto, for runs that are not yet scored")
    wandb_log: bool = option(False, "log table and plots to wandb, in the group of the sweep")
    wandb_project: str = option("nanomix", "wandb project", min_length=1)


# Runs -----------------------------------------------------------------------------------------

def records_to_compare(names, device):
    """The finished runs that the command line names, scored where they are not: a list of Record.
    BadInput if there is none, or one is damaged or not finished."""
    found = {}
    for name in names:
        folder = Path(name)
        say_what_is_missing(folder)
        records = read_records(folder)
        if not records:
            raise BadInput(f"no run to compare in {name}; {WHAT_TO_NAME}")
        for record in records:
            found[os.path.abspath(record.source), record.name] = record
    if not found:
        raise BadInput(f"no run to compare; {WHAT_TO_NAME}")
    for record in found.values():
        check_finished(record, device)
    return list(found.values())


def say_what_is_missing(folder):
    """Prints which runs of a sweep failed or have not run yet."""
    if holds_run(folder) or not exists(folder / "sweep.json"):
        return
    sweep = read_sweep(folder)
    for run, wrong in sweep.failed.items():
        print(printable(f"not in the table: {run}: {wrong}"))
    unfinished = set(sweep.missing) - {Path(run).name for run in sweep.failed}
    if unfinished:
        print(printable(f"{folder}: the sweep has not ended, {len(unfinished)} runs are missing"))


def check_finished(record, device):
    """Scores the run if it is not scored. BadInput if it has not ended, or its model is none."""
    steps = record.config["max_iters"]
    evaluated = [row["iter"] for row in record.metrics if row.get("val_loss") is not None]
    if steps not in evaluated:
        raise BadInput(f"{record} has not reached its {steps} steps; "
                       "train it to its end, or leave it out")
    if record.scores is None:
        if is_records_file(record.source):
            raise BadInput(f"{record} has no scores; leave it out, or keep it anew from its run")
        record.scores = scores_of(record.source, device)
    model_config_of(record)


def model_config_of(record):
    """The GPTConfig of a run. BadInput if its options do not hold together."""
    source = record.source
    if not is_records_file(source):
        source = source / "config.json"
    return model_config({**record.config, "vocab_size": record.scores["vocab_size"]}, source)


def judge_arms(arms, baseline):
    """{label: Verdict}. What leaks has none: its losses say nothing, and may not weigh on the
    others' p either."""
    losses = {arm.label: arm.reported("loss") for arm in arms}
    leaking = [arm.label for arm in arms if arm.leaks and arm.label != baseline]
    honest = {label: values for label, values in losses.items() if label not in leaking}
    verdicts = judge(honest, baseline)
    for label in leaking:
        alone = judge({label: losses[label], baseline: losses[baseline]}, baseline)[label]
        alone.p = None
        alone.verdict = "leaks"
        verdicts[label] = alone
    return verdicts


# The table ------------------------------------------------------------------------------------

@dataclass
class TableLine:
    """An arm's figures, as table.csv has them: medians of what a machine does, means of losses (in
    nats) and half the widths of their 95 % intervals. None: there is none."""
    mixer: str
    seeds: int
    learning_rate: float
    parameters: int
    state_bytes: Optional[int]
    flops_per_token: Optional[float]
    tokens_per_s: Optional[float]
    peak_bytes: Optional[float]
    steps: int
    val_loss: float
    val_loss_interval: Optional[float]
    loss: float
    loss_interval: Optional[float]
    bpb: Optional[float]
    bpb_interval: Optional[float]
    accuracy: Optional[float]
    accuracy_interval: Optional[float]
    difference: float
    difference_low: Optional[float]
    difference_high: Optional[float]
    p: Optional[float]
    verdict: str


def line_of(arm, verdict):
    """The TableLine of an Arm and its Verdict."""
    config = model_config_of(arm.records[0])
    model = build(config, arm.records[0])
    val_losses = arm.final_val_losses()
    losses = arm.reported("loss")
    bpb, bpb_interval = mean_and_interval(arm.reported("bpb"))
    accuracy, accuracy_interval = mean_and_interval(arm.reported("accuracy"))
    return TableLine(
        mixer=arm.label,
        seeds=len(arm.records),
        learning_rate=arm.config["learning_rate"],
        parameters=sum(p.numel() for p in model.parameters()),
        state_bytes=model.state_bytes(config.block_size, DTYPES[arm.config["dtype"]]),
        flops_per_token=model.flops_per_token(config.block_size),
        tokens_per_s=arm.measured("tokens_per_s", median),
        peak_bytes=arm.measured("peak_bytes", max),
        steps=arm.config["max_iters"],
        val_loss=mean(val_losses),
        val_loss_interval=interval(val_losses),
        loss=mean(losses),
        loss_interval=interval(losses),
        bpb=bpb,
        bpb_interval=bpb_interval,
        accuracy=accuracy,
        accuracy_interval=accuracy_interval,
        **asdict(verdict),
    )


def build(config, record):
    """A model of a run's sizes, to be counted. BadInput if they are out of all proportion."""
    C, V = config.n_embd, config.vocab_size
    features = (config.performer_features or 0) + config.linformer_segment * config.linformer_slots
    layer = 4 * C * C + 3 * C * config.ffn_hidden + features * C
    if (2 * V + config.block_size) * C + config.n_layer * max(layer, 2**10) > LARGEST:
        raise BadInput(f"{record}: a model of these sizes has more than {LARGEST:,} parameters, "
                       "and is not built to be compared; leave it out")
    with torch.random.fork_rng():
        return GPT(config)


def mean_and_interval(values):
    """(None, None) if one is missing."""
    if None in values:
        return None, None
    return mean(values), interval(values)


def cells(line):
    """A TableLine in words, {column: text}."""
    difference = f"{line.difference:+.4f}"
    if line.difference_low is not None:
        difference += f" [{line.difference_low:+.4f}, {line.difference_high:+.4f}]"
    return {
        "mixer": printable(line.mixer),
        "seeds": str(line.seeds),
        "lr": f"{line.learning_rate:g}",
        "parameters": f"{line.parameters:,}",
        "state bytes": in_units(line.state_bytes, ",.0f"),
        "MFLOP/token": in_units(line.flops_per_token, ",.2f", 1e6),
        "tokens/s": in_units(line.tokens_per_s, ",.0f"),
        "peak MiB": in_units(line.peak_bytes, ",.0f", 2**20),
        "val loss": with_interval(line.val_loss, line.val_loss_interval),
        "report loss": with_interval(line.loss, line.loss_interval),
        "bits/byte": with_interval(line.bpb, line.bpb_interval),
        "accuracy": with_interval(line.accuracy, line.accuracy_interval),
        "minus baseline": difference,
        "p": in_units(line.p, ".2g"),
        "verdict": line.verdict,
    }


def in_units(value, form, unit=1):
    return "n/a" if value is None else format(value / unit, form)


def with_interval(value, half_width):
    if value is None:
        return "n/a"
    return f"{value:.4f}" if half_width is None else f"{value:.4f} ± {half_width:.4f}"


def columns_of(lines):
    """The table by columns, {name: its texts from the header down}, each padded to one width; the
    second text is Markdown's rule. Columns that say nothing are left out."""
    rows = [cells(line) for line in lines]
    columns = {}
    for name in rows[0]:
        texts = [row[name] for row in rows]
        if set(texts) == {"n/a"}:
            continue
        width = max(map(len, [name, *texts]))
        if name in ("mixer", "verdict"):
            padded = [text.ljust(width) for text in [name, *texts]]
            rule = "-" * width
        else:
            padded = [text.rjust(width) for text in [name, *texts]]
            rule = "-" * (width - 1) + ":"
        columns[name] = [padded[0], rule, *padded[1:]]
    return columns


def table(lines):
    """The TableLines as a Markdown table, aligned."""
    return markdown(columns_of(lines).values())


def markdown(columns):
    return "\n".join("| " + " | ".join(row) + " |" for row in zip(*columns))


def table_for_terminal(lines, width):
    """The table in as many parts, one below the other, as it takes to fit into `width` characters;
    each begins with the mixer."""
    mixer, *columns = columns_of(lines).values()
    parts, part = [], [mixer]
    for column in columns:
        if len(part) > 1 and sum(len(c[0]) + 3 for c in [*part, column]) + 1 > width:
            parts.append(part)
            part = [mixer]
        part.append(column)
    parts.append(part)
    return "\n\n".join(map(markdown, parts))


def notes(arms, lines, baseline):
    """What stands below the table, a list of lines."""
    leaking = [arm.label for arm in arms if arm.leaks]
    found = [
        f"{lines[0].steps} steps; against {baseline}: "
        "Welch's test over the seeds, p adjusted by Holm, intervals not",
        "tokens/s, peak MiB and seconds are as the machine was then; for speed see bench.py",
    ]
    for name in arms[0].settings:
        found.append(f"not equal: {name} is {values_in_words(arms, name)}")
    if leaking:
        found.append("trained with --allow_leak, losses may not be compared: " + ", ".join(leaking))
    return [printable(note) for note in found]


def values_in_words(arms, option_name):
    """Which arms have which value of an option; those on which it has no effect are left out."""
    labels = {}
    for arm in arms:
        if has_effect(option_name, arm.mixer, arm.config.get("n_layer", 1)):
            labels.setdefault(arm.settings[option_name], []).append(arm.label)
    return "; ".join(f"{value} for {', '.join(those)}" for value, those in labels.items())


# Keeping --------------------------------------------------------------------------------------

def sweeps_among(names):
    return [Path(name) for name in names if exists(Path(name) / "sweep.json")]


@dataclass
class Kept:
    """What --keep writes."""
    files: dict            # {path: bytes}, of records
    sweep: Optional[dict]  # the content of sweep.json


def to_keep(records, names, folder):
    """The Kept of the runs that are compared; of a sweep also those that chose its learning rates.
    BadInput if they cannot be kept there."""
    check_keep(records, folder)
    kept = {record.name: record for record in records}
    sweeps = sweeps_among(names)
    if len(sweeps) == 1:
        for record in scored_runs(sweeps[0]):
            kept.setdefault(record.name, record)
    files = contents_of(folder, kept.values())
    return Kept(files, sweep_to_keep(records, sweeps, folder))


def check_keep(records, folder):
    """BadInput if two of the records would be one, or if they are there."""
    names = {record.name for record in records}
    sources = set()
    for record in records:
        sources.add(record.source.parent.resolve())
    if len(names) < len(records) or folder.resolve() in sources:
        raise BadInput(f"--keep={folder}: two runs have the same name, or are there already; "
                       "choose another folder")


def sweep_to_keep(records, sweeps, folder):
    """The content of the sweep.json to keep beside the records, or None: that of the one sweep
    they are of, or what is there already, which must name all that is to be compared."""
    if len(sweeps) != 1:
        sweeps = sweeps_among([folder])
    if not sweeps:
        return None
    read_sweep(sweeps[0])
    content = read_json(sweeps[0] / "sweep.json", REMEDY)
    missing = [record.name for record in records if record.name not in content["runs"]]
    content["runs"] = content["runs"] + missing
    return content


def keep(kept, folder):
    for path, content in kept.files.items():
        write_file(path, content)
    if kept.sweep is not None:
        write_json(folder / "sweep.json", kept.sweep)
    print(printable(f"the runs' records are in {folder}"))


# The command ----------------------------------------------------------------------------------

def read_command_line(words):
    """(paths, CompareOptions): paths come first."""
    count = 0
    while count < len(words) and not words[count].startswith("-"):
        count += 1
    description = __doc__.splitlines()[0] + " Folders come first."
    options, _, _ = parse_options(CompareOptions, words[count:], description,
                                  with_config_file=False)
    return words[:count], options


def baseline_of(options, arms):
    """The label of the arm that the others are tested against. BadInput if it is not there."""
    labels = [arm.label for arm in arms]
    if options.baseline is None:
        return "softmax" if "softmax" in labels else labels[0]
    if options.baseline not in labels:
        raise BadInput(f"--baseline={options.baseline}: not among the runs; "
                       f"have {', '.join(labels)}")
    return options.baseline


def folder_for(options, first):
    """Where table and plots go: made if it is not there."""
    folder = Path(first)
    if is_records_file(folder):
        folder = folder.parent
    out = Path(options.out_dir or folder / "compare")
    with writing(out):
        out.mkdir(parents=True, exist_ok=True)
    return out


def csv_of(lines):
    """The bytes of table.csv: names as they are."""
    content = io.StringIO()
    writer = csv.DictWriter(content, [f.name for f in fields(TableLine)], lineterminator="\n")
    writer.writeheader()
    writer.writerows(asdict(line) for line in lines)
    return content.getvalue().encode(errors="backslashreplace")


def by_loss(line):
    return line.loss


@exit_on_bad_input("tools.compare")
def main():
    names, options = read_command_line(sys.argv[1:])
    if options.mixer_file:
        load_mixer_file(options.mixer_file)
    records = records_to_compare(names, choose_device(options.device))
    arms = arms_of(records)
    if options.keep:
        kept = to_keep(records, names, Path(options.keep))
    baseline = baseline_of(options, arms)
    verdicts = judge_arms(arms, baseline)
    lines = sorted([line_of(arm, verdicts[arm.label]) for arm in arms], key=by_loss)
    below = "\n".join(notes(arms, lines, baseline))
    if sys.stdout.isatty():
        print(table_for_terminal(lines, shutil.get_terminal_size().columns))
    else:
        print(table(lines))
    print(f"\n{below}")
    out = folder_for(options, names[0])
    write_file(out / "table.md", f"{table(lines)}\n\n{below}\n".encode())
    write_file(out / "table.csv", csv_of(lines))
    by_label = {arm.label: arm.records for arm in arms}
    groups = {line.mixer: by_label[line.mixer] for line in lines}
    pictures = list(plots.draw(out, groups, lines))
    written = ["table.md", "table.csv", *(path.name for path in pictures)]
    print(printable(f"{', '.join(written)} are in {out}"))
    if options.keep:
        keep(kept, Path(options.keep))
    if options.wandb_log:
        log_to_wandb(options, Path(names[0]), out, lines, pictures)


def log_to_wandb(options, source, out, lines, pictures):
    import wandb
    run = start_wandb(options.wandb_project, f"{source.name} comparison", out,
                      group=source.name, job_type="comparison")
    rows = [list(asdict(line).values()) for line in lines]
    names = [f.name for f in fields(TableLine)]
    content = {"comparison": wandb.Table(columns=names, data=rows)}
    for path in pictures:
        content[path.stem] = wandb.Image(str(path))
    run.log(content)
    run.finish()


if __name__ == "__main__":
    main()
