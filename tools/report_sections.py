"""What tools/report.py says of runs, benches and inspections: sentences, tables, plots' numbers."""
import json
from dataclasses import dataclass
from statistics import mean, median
from typing import Optional

from base.errors import BadInput
from tools import report_figures as figures
from tools.compare import build, model_config_of, values_in_words
from tools.compare_arms import arms_of
from tools.ngrams import reference_lines
from tools.report_curves import curves
from tools.report_data import Bench, Runs, Section, is_running, seconds_taken, steps_done
from tools.report_others import section_of_inspection, sections_of_bench
from tools.score import DTYPES
from tools.sweep_runs import ASIDE
from tools.verdicts import Verdict, judge, margin_in_nats
from training.run_folder import NOT_OPTIONS

SOLVED = 0.95  # of the answers of a recall task
ORDER = ("better", "equivalent", "undecided", "one seed", "worse", "leaks")


@dataclass
class Row:
    """An arm's figures; None: not known."""
    label: str
    seeds: int
    loss: float              # on the report data, mean of the seeds, in nats
    bpb: Optional[float]
    accuracy: Optional[float]
    verdict: Verdict
    solved: Optional[int]    # of a recall task: seeds that answer at least SOLVED of it right
    parameters: Optional[int] = None
    state_bytes: Optional[int] = None
    flops_per_token: Optional[float] = None


def sections_of(found, baseline, margin_bpb):
    """The Sections of what tools/report_data.py has read."""
    sections = []
    for one in found:
        if isinstance(one, Runs):
            sections.append(section_of_runs(one, baseline, margin_bpb))
        elif isinstance(one, Bench):
            sections += sections_of_bench(one)
        else:
            sections.append(section_of_inspection(one))
    return sections


# Runs -----------------------------------------------------------------------------------------

def section_of_runs(runs, baseline, margin_bpb):
    section = Section(runs.title, status=status(runs), notes=list(runs.notes))
    arms = []
    try:
        if runs.finished:
            arms = arms_of(runs.finished)
    except BadInput as error:
        section.notes.append(f"not compared: {error}")
    if arms:
        looks = figures.Looks(arms, baseline_of(arms, baseline))
        add_comparison(section, arms, looks, margin_bpb)
    else:
        looks = figures.Looks([], None)
        section.sentence = "No finished and scored runs to compare yet."
    lines = lines_of(runs.finished)
    if runs.tuning:
        section.figures += tuning_figures(runs, looks)
    section.curves = curves(arms, runs, looks, lines)
    section.provenance |= provenance(runs.finished + runs.others or runs.tuning)
    return section


def baseline_of(arms, wanted):
    """The label of the arm that the others are compared with."""
    labels = [arm.label for arm in arms]
    for label in (wanted, "softmax"):
        if label in labels:
            return label
    return labels[0]


def add_comparison(section, arms, looks, margin_bpb):
    """Verdicts, table and plots of arms that can be compared."""
    of_baseline = next(arm for arm in arms if arm.label == looks.baseline)
    margin = margin_in_nats(margin_bpb, of_baseline.records[0].scores)
    verdicts = judge_arms(arms, looks.baseline, margin)
    rows = [row_of(arm, verdicts[arm.label], section.notes) for arm in arms]
    rows.sort(key=lambda row: row.loss)
    hours = {arm.label: sum(map(seconds_taken, arm.records)) / 3600 for arm in arms}
    rates = {arm.label: arm.config["learning_rate"] for arm in arms}
    speeds = {arm.label: arm.measured("tokens_per_s", median) for arm in arms}
    lines = lines_of(of_baseline.records)
    section.table = table(rows, lines)
    for row, line in zip(rows, section.table):
        line["lr"] = f"{rates[row.label]:g}"
        line["tokens/s"] = in_words(speeds[row.label], ",.0f")
        line["hours"] = f"{hours[row.label]:.2f}"
    section.sentence = sentence(rows, looks.baseline)
    unit = "nats per token" if rows[0].accuracy is None else "nats per answer"
    if len(rows) > 1:
        section.figures.append(figures.differences(rows, looks, margin, unit))
    add_plots(section, arms, rows, looks, lines)
    unknown = [row.label for row in rows if row.state_bytes is None]
    if unknown:
        section.notes.append(f"bytes of state are not known of {', '.join(unknown)}")
    for name in arms[0].settings:
        section.notes.append(f"not equal: {name} is {values_in_words(arms, name)}")
    for arm in arms:
        diverged = sum(bool(record.scores.get("diverged")) for record in arm.records)
        if diverged:
            section.notes.append(f"{arm.label}: {diverged} of {len(arm.records)} runs diverged, "
                                 "and count as an even guess")


def add_plots(section, arms, rows, looks, lines):
    """Loss by position, accuracy by difficulty and loss against state, where there are any."""
    records = [record for arm in arms for record in arm.records]
    if all(record.scores["by_position"] for record in records):
        section.figures.append(figures.over_position(arms, looks, lines))
    if all(record.scores["by_cell"] for record in records):
        section.figures.append(figures.over_cells(arms, looks))
    with_state = [row for row in rows if row.state_bytes is not None]
    if with_state:
        section.figures.append(figures.over_state(with_state, looks))


def judge_arms(arms, baseline, margin):
    """{label: Verdict}. What leaks has none, and its losses weigh on nobody."""
    losses, leaking = {}, {}
    for arm in arms:
        if arm.leaks and arm.label != baseline:
            leaking[arm.label] = Verdict(0.0, word="leaks", seeds=len(arm.records))
        else:
            losses[arm.label] = {record.config["seed"]: blocks_of(record) for record in arm.records}
    counts = {len(blocks) for of_arm in losses.values() for blocks in of_arm.values()}
    if len(counts) > 1:  # records of two versions: seeds alone then
        losses = {label: {seed: [mean(blocks)] for seed, blocks in of_arm.items()}
                  for label, of_arm in losses.items()}
    return judge(losses, baseline, margin) | leaking


def blocks_of(record):
    return record.scores.get("by_block") or [record.scores["report"]["loss"]]


def row_of(arm, verdict, notes):
    """The Row of an arm; what cannot be counted, a user's own mixer say, is noted."""
    reports = [record.scores["report"] for record in arm.records]
    row = Row(arm.label, len(reports), mean(part["loss"] for part in reports),
              mean_or_none([part["bpb"] for part in reports]),
              mean_or_none([part["accuracy"] for part in reports]), verdict, solved(reports))
    try:
        config = model_config_of(arm.records[0])
        model = build(config, arm.records[0])
    except BadInput as error:
        notes.append(f"{arm.label} is not counted: {error}")
        return row
    row.parameters = sum(p.numel() for p in model.parameters())
    row.state_bytes = model.state_bytes(config.block_size, DTYPES[arm.config["dtype"]])
    row.flops_per_token = model.flops_per_token(config.block_size)
    return row


def solved(reports):
    accuracies = [part["accuracy"] for part in reports]
    if None in accuracies:
        return None
    return sum(accuracy >= SOLVED for accuracy in accuracies)


def mean_or_none(values):
    return None if None in values else mean(values)


def in_words(value, form):
    return "" if value is None else format(value, form)


def difference_in_words(verdict):
    if verdict.word in ("baseline", "leaks"):
        return ""
    text = f"{verdict.difference:+.4f}"
    if verdict.difference_low is not None:
        text += f" [{verdict.difference_low:+.4f}, {verdict.difference_high:+.4f}]"
    return text


def table(rows, lines):
    """The table in words, {column: text} a row, and below it what puts a loss into its place."""
    listed = [cells(row) for row in rows]
    for name, loss in sorted(lines.items(), key=lambda item: item[1]):
        listed.append({"mixer": name, "loss": f"{loss:.4f}", "verdict": "counted"})
    return listed


def cells(row):
    """An arm's row in words; what a phone shows comes first."""
    megaflops = None if row.flops_per_token is None else row.flops_per_token / 1e6
    solved = None
    if row.solved is not None:
        solved = f"{row.solved} of {row.seeds}"
    return {
        "mixer": row.label,
        "loss": f"{row.loss:.4f}",
        "minus baseline": difference_in_words(row.verdict),
        "verdict": str(row.verdict),
        "seeds": str(row.seeds),
        "bits/byte": in_words(row.bpb, ".4f"),
        "accuracy": in_words(row.accuracy, ".4f"),
        "solved": solved or "",
        "parameters": in_words(row.parameters, ","),
        "state bytes": in_words(row.state_bytes, ",.0f"),
        "MFLOP/token": in_words(megaflops, ",.2f"),
    }


def sentence(rows, baseline):
    """The verdicts in one sentence, or what stands in their place."""
    [of_baseline] = [row for row in rows if row.label == baseline]
    if len(rows) == 1:
        return (f"{baseline}: loss {of_baseline.loss:.4f} nats, {of_baseline.seeds} seeds; "
                "nothing to compare it with.")
    words = {}
    for row in rows:
        words.setdefault(row.verdict.word, []).append(row.label)
    parts = [f"{word}: {', '.join(words[word])}" for word in ORDER if word in words]
    seeds = sorted({row.verdict.seeds for row in rows if row.label != baseline})
    span = f"{seeds[0]}" if len(seeds) == 1 else f"{seeds[0]} to {seeds[-1]}"
    reached = f"loss {of_baseline.loss:.4f}"
    if of_baseline.accuracy is not None:
        reached = f"accuracy {of_baseline.accuracy:.3f}"
    return f"Against {baseline} ({reached}, {span} seeds) {'; '.join(parts)}."


def lines_of(records):
    """{name: loss} of what puts a loss into its place, or {} where there is no record."""
    if not records:
        return {}
    return reference_lines(records[0].config, records[0].scores)


def tuning_figures(runs, looks):
    """The loss on the data to choose by, over each number that was tuned."""
    by_mixer = {}
    for record in runs.tuning:
        by_mixer.setdefault(record.config["mixer"].replace(",", "+"), []).append(record)
    for name in tuned_options(by_mixer.values()):
        groups, chosen = {}, {}
        for mixer, records in by_mixer.items():
            losses = {}
            for record in records:
                part = record.scores["select"] or record.scores["report"]
                value = record.config[name]
                losses[value] = min(part["loss"], losses.get(value, part["loss"]))
            groups[mixer] = losses
        for record in runs.finished:
            chosen[record.config["mixer"].replace(",", "+")] = record.config.get(name)
        yield figures.over_option(name, groups, chosen, looks)


def tuned_options(groups):
    """The names of the options above 0 that differ among the runs of one mixer."""
    names = []
    for records in groups:
        for name in records[0].config:
            values = {json.dumps(record.config.get(name)) for record in records}
            if len(values) < 2 or name in ("seed", *names):
                continue
            if all(is_positive(record.config.get(name)) for record in records):
                names.append(name)
    return names


def is_positive(value):
    return isinstance(value, (int, float)) and not isinstance(value, bool) and value > 0


# What runs, and what was run -----------------------------------------------------------------

def status(runs):
    """What runs now and how long it will take, a list of lines."""
    lines = []
    running = [record for record in runs.others if is_running(record)]
    for record in runs.others:
        done, steps = steps_done(record), record.config["max_iters"]
        if done >= steps:
            lines.append(f"{record.name}: trained to its end, not scored "
                         f"(python -m tools.score --out_dir={record.source})")
            continue
        state = "runs" if record in running else "stopped or waiting"
        line = f"{record.name}: {state}, step {done:,} of {steps:,}"
        if record in running and done:
            left = seconds_taken(record) / done * (steps - done)
            line += f", about {left / 60:.0f} min left"
        lines.append(line)
    if runs.sweep:
        lines += status_of_sweep(runs, max(1, len(running)))
    return lines


def status_of_sweep(runs, at_once):
    """What a sweep lacks and how long that will take, as its runs took and `at_once` at a time."""
    lines = [f"failed: {name}: {error}" for name, error in runs.sweep.failed.items()]
    started = {record.name for record in runs.others}
    missing = [name for name in runs.sweep.missing if name not in runs.sweep.failed]
    if missing:
        line = f"{len(missing)} runs of the sweep are missing"
        times = [seconds_taken(record) for record in runs.finished + runs.tuning]
        waiting = len([name for name in missing if name not in started])
        if times and waiting:
            line += f"; those not yet started take about {waiting * mean(times) / at_once / 60:.0f}"
            line += f" min, {at_once} at a time"
        lines.append(line)
    return lines


def provenance(records):
    """{what: text} of the runs: options that all have, data, hours."""
    if not records:
        return {}
    options = []
    for name, value in records[0].config.items():
        if name in ASIDE or name in NOT_OPTIONS or name in ("mixer", "seed"):
            continue
        if all(record.config.get(name) == value for record in records):
            options.append(f"{name}={json.dumps(value)}")
    hours = sum(map(seconds_taken, records)) / 3600
    found = {"runs": f"{len(records)}, {hours:.2f} hours of training and evaluation in all"}
    for key in ("git", "machine", "torch"):  # where a version of train.py has recorded them
        values = {str(record.config[key]) for record in records if record.config.get(key)}
        if values:
            found[key] = ", ".join(sorted(values))
    checksums = {json.dumps(record.config.get("data_sha256")) for record in records}
    found["checksums of the data"] = "; ".join(sorted(checksums - {"null"})) or "not recorded"
    found["options that all runs have"] = ", ".join(options)
    return found
