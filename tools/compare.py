"""Is it better? Runs compared seed by seed, against a baseline.

Run: python -m tools.compare out/sweeps/shakespeare   (seconds)

    python -m tools.compare out/a out/b out/c --baseline=lln    any run folders; of a sweep those
                                                                with the chosen options
    python -m tools.compare results/shakespeare_strong          records that --keep has written: no
                                                                weights needed

Prints a table and what was not equal between the mixers; writes out_dir/table.md, table.csv and

    verdicts.png   the loss of every seed, and the verdict
    loss.png       validation loss over steps, over training FLOPs and over time: median of the
                   seeds, and their range
    state.png      final loss over the bytes of state that decoding keeps after T tokens
    position.png   loss at each position of the context: falling as long as a mixer makes use of
                   more of it
    rates.png      of a sweep that has tuned: the loss that chose over the learning rate

Losses are those of the *report* data, which chose nothing (tools/score.py), at the last step: mean
over the seeds and its 95 % interval (Student's t). The verdicts are of the differences seed by
seed, over seeds and text, in the words of tools/verdicts.py: *better*, *worse*, *equivalent*
(within --margin_bpb), *undecided* and what is missing. Of a recall task nothing is equivalent, and
a seed has *solved* it from an accuracy of 0.95. Another data set, size or number of steps may order
the mixers otherwise. The table's last lines are what needs no model: counting, or guessing.
"""
import base.errors  # noqa: F401  before all others: Ctrl-C ends these quietly
import os
import sys
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Optional

from base.command_line import paths_and_options
from base.errors import BadInput, exit_on_bad_input, printable
from base.files import exists, read_json, write_file, write_json, writing
from base.options import checked, option
from base.terminal import is_terminal, width, wrapped
from mixers import load_mixer_file
from tools import compare_plots as plots
from tools.compare_arms import (
    arms_of, is_diverged, is_held_out, is_tuning, judge_arms, tuning_arms_of)
from tools.compare_curves import View
from tools.compare_table import (
    TableLine, csv_of, in_range, line_of, model_config_of, notes, references_of, table,
    table_for_terminal, unequal_parameters)
from tools.records import REMEDY, contents_of, holds_run, is_records_file, read_records
from tools.records import read_sweep, scored_runs
from tools.score import scores_of
from tools.sweep_file import read_sweep_file
from tools.verdicts import MARGIN_BPB, margin_in_nats
from training.device import choose_device
from training.metrics import say_how_to_sync, start_wandb, wandb_group, wandb_id_of

OF_ARMS = ("word", "loss", "difference", "parameters", "state_bytes", "flops_per_token")  # in wandb
WHAT_TO_NAME = "name run folders, or a sweep: python -m tools.compare out/sweeps/shakespeare"


@checked
class CompareOptions:
    baseline: Optional[str] = option(
        None, "what the others are compared with, as the table names it "
        "[default: softmax, or else the first by name]")
    margin_bpb: float = option(
        MARGIN_BPB, "bits per byte: losses of a text that differ by less are equivalent", gt=0)
    out_dir: Optional[str] = option(
        None, "where table and plots go [default: <the first folder>/compare]", min_length=1)
    keep: Optional[str] = option(
        None, "write the runs' records (no weights) to this folder, which can be compared again",
        min_length=1)
    mixer_file: Optional[str] = option(
        None, "the Python file of the mixer, if a run was trained with one", min_length=1)
    device: str = option(
        "auto", "cpu, cuda, cuda:1, mps, or auto, for runs that are not yet scored")
    wandb_log: bool = option(
        False, "log table and plots to wandb, in the group of the sweep, and each run's verdict")
    wandb_project: str = option("nanomix", "wandb project", min_length=1)


# Runs -----------------------------------------------------------------------------------------

def records_to_compare(names, device):
    """The finished runs that the command line names, scored where they are not: a list of Record.
    Those that were made to choose options by are left out. BadInput if there is none, or one is
    damaged or not finished."""
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
    records = [record for record in found.values() if not is_held_out(record)]
    for record in records:
        check_finished(record, device)
    records = [record for record in records if not is_tuning(record)]
    if not records:
        raise BadInput(f"no run to compare in {', '.join(names)}, only some to choose options by "
                       "(with --holdout, or seed 0 of a recall task); train others to report on")
    return records


def tuning_records(names):
    """The scored runs in the folders that the command line names, made to choose options by: a list
    of Record."""
    found = {}
    for name in names:
        for record in scored_runs(name):
            if is_tuning(record) and record.scores["select"] is not None:
                found[os.path.abspath(record.source), record.name] = record
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
    if record.scores is None or not is_diverged(record):
        steps = record.config["max_iters"]
        evaluated = [row["iter"] for row in record.metrics if row.get("val_loss") is not None]
        if steps not in evaluated:
            raise BadInput(f"{record} has not reached its {steps} steps; "
                           "train it to its end, or leave it out")
    if record.scores is None:
        if is_records_file(record.source):
            raise BadInput(f"{record} has no scores; leave it out, or keep it anew from its run")
        record.scores = scores_of(record.source, device)
    if record.scores["report"] is None:
        raise BadInput(f"{record} has no report loss; leave it out, or score it anew")
    model_config_of(record)


# Verdicts -------------------------------------------------------------------------------------

def margin_of(arms, baseline, margin_bpb):
    """The margin in nats per token; None of a recall task."""
    [arm] = [arm for arm in arms if arm.label == baseline]
    return margin_in_nats(margin_bpb, arm.steady.scores)


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

def baseline_of(options, arms):
    """The label of the arm that the others are compared with. BadInput if it is not there."""
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


def by_loss(line):
    return line.loss


def title_of(arms, names):
    """What the pictures are of: data set, recipe if a sweep says it, steps and seeds."""
    words = [arms[0].config["dataset"]]
    words += [read_sweep_file(folder).config or "" for folder in sweeps_among(names)[:1]]
    steps = in_range([arm.config["max_iters"] for arm in arms])
    seeds = in_range([len(arm.records) for arm in arms])
    words += [f"{steps} steps", f"{seeds} seeds"]
    return ", ".join(filter(None, words))


def show(lines, references, below):
    """Prints the table and what stands below it, in a terminal as it has room for them."""
    if not is_terminal():
        print(f"{table(lines, references)}\n\n{below}")
        return
    print(table_for_terminal(lines, width(), references), end="\n\n")
    for note in below.split("\n"):
        print(wrapped(note))


@exit_on_bad_input("tools.compare")
def main():
    names, options, _ = paths_and_options(
        CompareOptions, sys.argv[1:], __doc__.splitlines()[0])
    if options.mixer_file:
        load_mixer_file(options.mixer_file)
    records = records_to_compare(names, choose_device(options.device))
    arms = arms_of(records)
    if options.keep:
        kept = to_keep(records, names, Path(options.keep))
    baseline = baseline_of(options, arms)
    margin = margin_of(arms, baseline, options.margin_bpb)
    verdicts = judge_arms(arms, baseline, margin)
    by_label = {arm.label: arm for arm in arms}
    lines = [line_of(arm, verdicts[arm.label], margin) for arm in arms]
    lines.sort(key=by_loss)
    references = references_of(by_label[baseline])
    found = notes(arms, verdicts, baseline, options.margin_bpb, margin)
    below = "\n".join(found + unequal_parameters(lines, baseline))
    show(lines, references, below)
    out = folder_for(options, names[0])
    write_file(out / "table.md", f"{table(lines, references)}\n\n{below}\n".encode())
    write_file(out / "table.csv", csv_of(lines, references))
    groups = {line.mixer: by_label[line.mixer].records for line in lines}
    view = View(title_of(arms, names), groups, lines, references, baseline)
    pictures = list(plots.draw(out, view, tuning_arms_of(tuning_records(names))))
    written = ["table.md", "table.csv", *(path.name for path in pictures)]
    print(printable(f"{', '.join(written)} are in {out}"))
    if options.keep:
        keep(kept, Path(options.keep))
    if options.wandb_log:
        log_to_wandb(options, Path(names[0]), out, lines, pictures)
        for line in lines:
            add_verdict(options, line, baseline, by_label[line.mixer].records)
        for folder in sorted({record.source.parent for record in records}):
            say_how_to_sync(folder)


def log_to_wandb(options, source, out, lines, pictures):
    """A run beside those of the sweep: the table, the pictures, and each arm's verdict and figures
    in config and summary."""
    import wandb
    arms = {line.mixer: {name: getattr(line, name) for name in OF_ARMS} for line in lines}
    config = {"baseline": options.baseline, "margin_bpb": options.margin_bpb, "arms": arms}
    run = start_wandb(options.wandb_project, f"{source.name} comparison", out,
                      group=wandb_group(source), job_type="comparison", config=config)
    rows = [list(asdict(line).values()) for line in lines]
    names = [f.name for f in fields(TableLine)]
    content = {"comparison": wandb.Table(columns=names, data=rows)}
    for path in pictures:
        content[path.stem] = wandb.Image(str(path))
    run.log(content)
    for label, values in arms.items():
        run.summary.update({f"{label}/{name}": value for name, value in values.items()})
    run.finish()


def add_verdict(options, line, baseline, records):
    """Adds an arm's verdict to the summaries of the wandb runs that its runs were."""
    summary = {"verdict": line.word, "verdict_against": baseline, "difference": line.difference,
               "difference_low": line.difference_low, "difference_high": line.difference_high}
    for record in records:
        if wandb_id := wandb_id_of(record.source):
            run = start_wandb(options.wandb_project, None, record.source, say=False, id=wandb_id,
                              resume="allow")
            run.summary.update({k: value for k, value in summary.items() if value is not None})
            run.finish()


if __name__ == "__main__":
    main()
