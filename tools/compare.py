"""Is it better? Runs compared over their seeds, against a baseline. Run: python -m tools.compare out/sweeps/shakespeare   (seconds)

    python -m tools.compare out/a out/b out/c --baseline=lln           any run folders; of a sweep those with the chosen learning rates
    python -m tools.compare results/shakespeare                        records that --keep has copied: no weights needed

Prints a table and what was not equal between the mixers, and writes out_dir/table.md, table.csv and plots:

    verdicts.png   the loss of every seed, and the verdict
    loss.png       validation loss over steps, over training FLOPs and over time: median of the seeds, and their range
    state.png      final loss over the bytes of state that decoding keeps after T tokens
    position.png   loss at each position of the context: falling as long as a mixer makes use of more of it

Losses are those of the *report* data, which chose nothing (tools/score.py), at the last step: mean over the seeds and its 95 %
interval (Student's t). The verdict is Welch's t-test of the seeds' losses against the baseline's, two-sided, the p values of all mixers
adjusted by Holm's method: *better* or *worse* below 0.05, otherwise *inside the seed noise*. It is about seeds alone: another data set,
size or number of steps may order them otherwise.
"""
import base.errors  # noqa: F401  before all others: Ctrl-C ends these quietly
import csv
import io
import json
import shutil
import sys
from collections import defaultdict
from pathlib import Path
from statistics import mean, median, stdev
from typing import Optional

import numpy as np
import torch
from scipy import stats

from base.command_line import parse_options
from base.errors import BadInput, exit_on_bad_input
from base.files import read_json, write_file, writing
from base.options import checked, option
from mixers import has_effect, load_mixer_file
from model import GPT, model_config
from tools import compare_plots as plots
from tools.score import scores_of
from tools.sweep_runs import ASIDE, read_sweep
from training.device import choose_device
from training.metrics import start_wandb
from training.run_folder import holds_run

SIGNIFICANT = 0.05
MUST_AGREE = ("dataset", "block_size", "eval_tokens")  # otherwise the losses are not of the same thing


@checked
class CompareOptions:
    baseline: Optional[str] = option(None, "what the others are tested against, as the table names it [default: softmax, or else the first by name]")
    out_dir: Optional[str] = option(None, "where table and plots go [default: <the first folder>/compare]", min_length=1)
    keep: Optional[str] = option(None, "copy the runs' records (no weights) to this folder, which can be compared again", min_length=1)
    mixer_file: Optional[str] = option(None, "the Python file of the mixer, if a run was trained with one", min_length=1)
    device: str = option("auto", "cpu, cuda, cuda:1, mps, or auto, for runs that are not yet scored")
    wandb_log: bool = option(False, "log table and plots to wandb, in the group of the sweep")
    wandb_project: str = option("nanomix", "wandb project", min_length=1)


# Runs ----------------------------------------------------------------------------------------------------------------

def run_folders(names):
    """The run folders that the command line names, sweeps and folders of runs opened. BadInput if there is none."""
    found = []
    for name in names:
        folder = Path(name)
        if holds_run(folder):
            these = [folder]
        elif (folder / "sweep.json").exists():
            sweep = read_sweep(folder)
            these = [folder / run for run in sweep["runs"]]
            for run, wrong in sweep["failed"].items():
                print(f"not in the table: {run}: {wrong}")
            if unfinished := len(set(sweep["missing"]) - {Path(run).name for run in sweep["failed"]}):
                print(f"{folder}: the sweep has not ended, {unfinished} runs are missing")
        else:
            these = sorted(path for path in folder.glob("*/") if holds_run(path))
        if not these:
            raise BadInput(f"no run to compare in {name}; name run folders, or a sweep: python -m tools.compare out/sweeps/shakespeare")
        found += these
    if not found:
        raise BadInput("no run to compare; name run folders, or a sweep: python -m tools.compare out/sweeps/shakespeare")
    return list(dict.fromkeys(found))


class Record:
    """What a run left behind: .config, .rows of metrics.jsonl, .scores."""

    def __init__(self, folder, device):
        self.folder = folder
        self.config = read_json(folder / "config.json", "leave this run out")
        if lacking := [name for name in ("mixer", "seed", "max_iters", "learning_rate", "dtype", *MUST_AGREE) if name not in self.config]:
            raise BadInput(f"{folder}/config.json is damaged: it lacks {', '.join(lacking)}; leave this run out")
        try:
            self.rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
            trained = any(row["iter"] == self.config["max_iters"] and row["val_loss"] is not None for row in self.rows)
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise BadInput(f"{folder}/metrics.jsonl cannot be read ({error!r}); leave this run out") from error
        if not trained:
            raise BadInput(f"{folder} has not reached its {self.config['max_iters']} steps; train it to its end, or leave it out")
        self.scores = scores_of(folder, device)

    def last_val_loss(self):
        return next(row["val_loss"] for row in reversed(self.rows) if row["val_loss"] is not None)


def grouped(records):
    """({label: records of that mixer and options, over the seeds}, {option: {label: value}} of what is not equal between them)."""
    options = [name for name in records[0].config if name not in ASIDE | {"mixer", "seed"}]
    value = lambda record, name: json.dumps(record.config.get(name))
    vary = [name for name in options if len({value(record, name) for record in records}) > 1]
    for name in set(vary) & set(MUST_AGREE):
        raise BadInput(f"the runs differ in {name} ({', '.join(sorted({value(r, name) for r in records}))}): their losses are not of the same thing")
    if len({frozenset(record.scores["by_cell"] or ()) for record in records}) > 1:
        raise BadInput("the runs were scored on rows of different lengths, as learned positions end at block_size: compare those with learned "
                       "positions apart from those without")
    groups = defaultdict(list)
    for record in records:
        groups[(record.config["mixer"], *(value(record, name) for name in vary))].append(record)
    labels = {}
    for mixer, *values in sorted(groups):
        alike = [other for other in groups if other[0] == mixer]  # told apart by what differs between them
        apart = [f"{name}={values[i]}" for i, name in enumerate(vary) if len({other[i + 1] for other in alike}) > 1]
        labels[" ".join([mixer.replace(",", "+"), *apart])] = (mixer, *values)
    for key, alike in groups.items():
        seeds = {}
        for record in alike:
            other = seeds.setdefault(record.config["seed"], record)
            if other is not record:
                raise BadInput(f"{other.folder} and {record.folder} are the same run twice, seed {record.config['seed']}; leave one out")
    counts = lambda name, label: has_effect(name, groups[labels[label]][0].config["mixer"], groups[labels[label]][0].config.get("n_layer", 1))
    unequal = {name: {label: json.loads(key[i + 1]) for label, key in labels.items() if counts(name, label)} for i, name in enumerate(vary)}
    return {label: sorted(groups[key], key=lambda record: record.config["seed"]) for label, key in labels.items()}, unequal


# Figures -------------------------------------------------------------------------------------------------------------

def interval(values):
    """Half the width of the 95 % interval of a mean, by Student's t; None of a single value."""
    return stats.t.ppf(0.975, len(values) - 1) * stdev(values) / len(values)**0.5 if len(values) > 1 else None


def holm(p):
    """Holm's adjustment of {name: p value}: that of the k-th smallest of n is multiplied by n - k + 1, and none falls below one before it."""
    adjusted, largest = {}, 0.0
    for k, name in enumerate(sorted(p, key=p.get)):
        largest = max(largest, min(1.0, p[name] * (len(p) - k)))
        adjusted[name] = largest
    return adjusted


def verdicts(losses, baseline):
    """{label: {"difference", "difference_low", "difference_high", "p", "verdict"}} of {label: losses of the seeds}: the mean's
    distance from the baseline's, its 95 % interval by Welch, and the adjusted p value."""
    tests = {label: stats.ttest_ind(values, losses[baseline], equal_var=False) for label, values in losses.items()
             if label != baseline and min(len(values), len(losses[baseline])) > 1}
    p = holm({label: test.pvalue if np.isfinite(test.pvalue) else 1.0 for label, test in tests.items()})
    result = {}
    for label, values in losses.items():
        difference = mean(values) - mean(losses[baseline])
        row = {"difference": difference, "difference_low": None, "difference_high": None, "p": p.get(label), "verdict": "one seed"}
        if label in tests:
            row["difference_low"], row["difference_high"] = tests[label].confidence_interval()
            row["verdict"] = "inside the seed noise" if p[label] >= SIGNIFICANT else "better" if difference < 0 else "worse"
        result[label] = row
    result[baseline] |= {"verdict": "baseline"}
    return result


def figures(label, records):
    """The line of a group: medians of what a machine does, means of losses."""
    config = model_config({**records[0].config, "vocab_size": records[0].scores["vocab_size"]}, records[0].folder)
    with torch.random.fork_rng():
        model = GPT(config)
    dtype = getattr(torch, records[0].config["dtype"])
    of_rows = lambda key, choose: [choose(values) for record in records if (values := [row[key] for row in record.rows if row.get(key) is not None])]
    middle = lambda values: median(values) if values else None
    line = {"mixer": label, "seeds": len(records), "learning_rate": records[0].config["learning_rate"], "parameters": sum(p.numel() for p in model.parameters()),
            "state_bytes": model.state_bytes(config.block_size, dtype), "flops_per_token": model.flops_per_token(config.block_size),
            "tokens_per_s": middle(of_rows("tokens_per_s", median)), "peak_bytes": middle(of_rows("peak_bytes", max)),
            "steps": records[0].config["max_iters"], "val_loss": mean(values := [record.last_val_loss() for record in records]), "val_loss_interval": interval(values)}
    for key in ("loss", "bpb", "accuracy"):
        values = [record.scores["report"][key] for record in records]
        line |= {key: None if None in values else mean(values), f"{key}_interval": None if None in values else interval(values)}
    return line


COLUMNS = {  # name in the table: from a line
    "mixer": lambda r: r["mixer"],
    "seeds": lambda r: str(r["seeds"]),
    "lr": lambda r: f"{r['learning_rate']:g}",
    "parameters": lambda r: f"{r['parameters']:,}",
    "state bytes": lambda r: shown(r["state_bytes"], ",.0f"),
    "MFLOP/token": lambda r: shown(r["flops_per_token"], ",.2f", 1e6),
    "tokens/s": lambda r: shown(r["tokens_per_s"], ",.0f"),
    "peak MiB": lambda r: shown(r["peak_bytes"], ",.0f", 2**20),
    "val loss": lambda r: spread(r, "val_loss"),
    "report loss": lambda r: spread(r, "loss"),
    "bits/byte": lambda r: spread(r, "bpb"),
    "accuracy": lambda r: spread(r, "accuracy"),
    "minus baseline": lambda r: f"{r['difference']:+.4f}" + ("" if r["difference_low"] is None else f" [{r['difference_low']:+.4f}, {r['difference_high']:+.4f}]"),
    "p": lambda r: shown(r["p"], ".2g"),
    "verdict": lambda r: r["verdict"],
}


def shown(value, form, unit=1):
    return "n/a" if value is None else format(value / unit, form)


def spread(line, key):
    return "n/a" if line[key] is None else f"{line[key]:.4f}" + ("" if line[f"{key}_interval"] is None else f" ± {line[f'{key}_interval']:.4f}")


def table(lines):
    """Markdown, aligned for the terminal; columns that say nothing are left out."""
    rows = [{name: cell(line) for name, cell in COLUMNS.items()} for line in lines]
    names = [name for name in COLUMNS if any(row[name] != "n/a" for row in rows)]
    width = {name: max(len(name), *(len(row[name]) for row in rows)) for name in names}
    line = lambda cells: "| " + " | ".join(cells) + " |"
    aligned = lambda row: line(f"{row[n]:<{width[n]}}" if n in ("mixer", "verdict") else f"{row[n]:>{width[n]}}" for n in names)
    rule = line(("-" * width[n] if n in ("mixer", "verdict") else "-" * (width[n] - 1) + ":") for n in names)
    return "\n".join([aligned({n: n for n in names}), rule, *map(aligned, rows)])


def differences(unequal):
    """A line for every option that was not the same for all."""
    for name, by_label in unequal.items():
        of_value = defaultdict(list)
        for label, value in by_label.items():
            of_value[json.dumps(value)].append(label)
        yield f"not equal: {name} is " + "; ".join(f"{value} for {', '.join(labels)}" for value, labels in of_value.items())


@exit_on_bad_input("tools.compare")
def main():
    words = sys.argv[1:]
    count = next((i for i, word in enumerate(words) if word.startswith("-")), len(words))
    options, _, _ = parse_options(CompareOptions, words[count:], __doc__.splitlines()[0] + " Folders come first.", with_config_file=False)
    if options.mixer_file:
        load_mixer_file(options.mixer_file)
    device = choose_device(options.device)
    records = [Record(folder, device) for folder in run_folders(words[:count])]
    groups, unequal = grouped(records)
    names, kept_in = {record.folder.name for record in records}, {record.folder.parent.resolve() for record in records}
    if options.keep and (len(names) < len(records) or Path(options.keep).resolve() in kept_in):
        raise BadInput(f"--keep={options.keep}: two runs have the same name, or are there already; choose another folder")
    for record in records if options.keep else []:
        there = Path(options.keep) / record.folder.name / "config.json"
        if there.exists() and there.read_bytes() != (record.folder / "config.json").read_bytes():
            raise BadInput(f"--keep={options.keep}: {there.parent} is of another run; choose another folder, or move it away")
    baseline = options.baseline or ("softmax" if "softmax" in groups else next(iter(groups)))
    if baseline not in groups:
        raise BadInput(f"--baseline={baseline}: not among the runs; have {', '.join(groups)}")
    losses = {label: [record.scores["report"]["loss"] for record in records] for label, records in groups.items()}
    leaking = [label for label, records in groups.items() if records[0].config.get("allow_leak")]
    tests = verdicts({label: of_label for label, of_label in losses.items() if label == baseline or label not in leaking}, baseline)
    for label in set(leaking) - {baseline}:  # its losses say nothing, and may not weigh on the others' p either
        tests[label] = verdicts({label: losses[label], baseline: losses[baseline]}, baseline)[label] | {"p": None, "verdict": "leaks"}
    lines = sorted((figures(label, records) | tests[label] for label, records in groups.items()), key=lambda line: line["loss"])
    first = lines[0]
    text = "\n".join([table(lines), "", f"{first['steps']} steps; against {baseline}: Welch's test over the seeds, p adjusted by Holm, intervals not",
                      "tokens/s, peak MiB and seconds are as the machine was then; for speed see bench.py", *differences(unequal), *([f"trained with --allow_leak, losses may not be compared: {', '.join(leaking)}"] if leaking else [])])
    print(text)
    out = Path(options.out_dir or Path(words[0]) / "compare")
    with writing(out):
        out.mkdir(parents=True, exist_ok=True)
    write_file(out / "table.md", (text + "\n").encode())
    content = io.StringIO()
    writer = csv.DictWriter(content, lines[0].keys(), lineterminator="\n")
    writer.writeheader()
    writer.writerows(lines)
    write_file(out / "table.csv", content.getvalue().encode())
    pictures = list(plots.draw(out, {line["mixer"]: groups[line["mixer"]] for line in lines}, lines))
    print(f"table.md, table.csv, {', '.join(path.name for path in pictures)} are in {out}")
    if options.keep:
        keep(records, Path(options.keep))
    if options.wandb_log:
        log_to_wandb(options, Path(words[0]), out, lines, pictures)


def keep(records, folder):
    """Copies each run's records to folder/<its name>."""
    with writing(folder):
        for record in records:
            (folder / record.folder.name).mkdir(parents=True, exist_ok=True)
            for name in ("config.json", "metrics.jsonl", "scores.json"):
                shutil.copyfile(record.folder / name, folder / record.folder.name / name)
    print(f"the runs' records are in {folder}")


def log_to_wandb(options, source, out, lines, pictures):
    import wandb
    run = start_wandb(options.wandb_project, f"{source.name} comparison", out, group=source.name, job_type="comparison")
    columns = list(lines[0])
    run.log({"comparison": wandb.Table(columns=columns, data=[[line[name] for name in columns] for line in lines]),
             **{path.stem: wandb.Image(str(path)) for path in pictures}})
    run.finish()


if __name__ == "__main__":
    main()
