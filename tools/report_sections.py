"""What tools/report.py says of runs: sentences, tables, the plots' numbers."""
import json
from dataclasses import replace
from statistics import mean

from base.command_line import shortened
from base.errors import BadInput
from tools import report_figures as figures
from tools.compare import judge_arms, margin_of
from tools.compare_arms import arms_of, is_diverged, rate_of, tuning_arms_of
from tools.compare_table import cells, line_of, mean_and_interval, notes, reference_cells
from tools.compare_table import references_of, unequal_parameters
from tools.report_curves import curves
from tools.report_data import Bench, Runs, Section, is_running, steps_done
from tools.report_others import section_of_inspection, sections_of_bench
from tools.sweep_cost import time_left
from tools.sweep_runs import ASIDE
from training.run_folder import NOT_OPTIONS

ORDER = ("better", "equivalent", "undecided", "one seed", "worse", "leaks")


def sections_of(found, baseline, margin_bpb):
    """The Sections of what tools/report_data.py has read, claims first. BadInput if none of them
    has an arm of the baseline's name (None: softmax)."""
    claims = [one for one in found if isinstance(one, Runs) and one.claim]
    sections = []
    for one in claims + [one for one in found if one not in claims]:
        if isinstance(one, Runs):
            sections.append(section_of_runs(one, baseline, margin_bpb))
        elif isinstance(one, Bench):
            sections += sections_of_bench(one)
        else:
            sections.append(section_of_inspection(one))
    labels = {row["mixer"] for section in sections for row in section.table}
    if baseline is not None and baseline not in labels:
        raise BadInput(f"--baseline={baseline}: not among the runs; "
                       f"have {', '.join(sorted(labels))}")
    return sections


# Verdicts -------------------------------------------------------------------------------------

def section_of_runs(runs, baseline, margin_bpb):
    section = Section(runs.title, status=status(runs), notes=list(runs.notes))
    section.sentence = nothing_yet(runs)
    if runs.claim:
        section.sentence = runs.claim.sentence()
        section.provenance |= runs.claim.provenance()
        baseline, margin_bpb = runs.claim.card.baseline, runs.claim.card.margin_bpb
    arms, looks, references = [], figures.Looks([], baseline or "softmax"), []
    try:
        if runs.finished:
            arms = arms_of(runs.finished)
    except BadInput as error:
        section.notes.append(f"not compared: {error}")
    if arms and runs.claim:
        runs.claim.name_arms(arms)
    if arms:
        looks = figures.Looks(arms, baseline_of(arms, baseline))
        references = references_of(arm_of(looks.baseline, arms))
        add_comparison(section, arms, looks, references, margin_bpb, runs.claim)
    if runs.tuning:
        section.figures.append(loss_over_rate(runs, arms, looks.baseline))
    section.curves = curves(arms, runs, looks, references)
    section.provenance |= provenance(runs.finished + runs.others or runs.tuning)
    return section


def nothing_yet(runs):
    """What stands in the place of verdicts while there is nothing to compare."""
    if runs.tuning:
        return (f"{in_number(len(runs.tuning), 'run')} to choose options by, "
                "none yet that is to be compared.")
    return "No finished and scored runs to compare yet."


def baseline_of(arms, wanted):
    """The label of the arm that the others are compared with. A page may have sections without the
    one that is wanted."""
    labels = [arm.label for arm in arms]
    for label in (wanted, "softmax"):
        if label in labels:
            return label
    return labels[0]


def arm_of(label, arms):
    return next(arm for arm in arms if arm.label == label)


def add_comparison(section, arms, looks, references, margin_bpb, claim=None):
    """Sentence, table, notes and plots of arms that can be compared; a claim has its own words."""
    margin = margin_of(arms, looks.baseline, margin_bpb)
    if claim:
        verdicts = claim.verdicts(arms)
    else:
        verdicts = judge_arms(arms, looks.baseline, margin)
        section.sentence = sentence(arms, verdicts, looks.baseline)
    lines = []
    for arm in arms:
        try:
            lines.append(line_of(arm, verdicts[arm.label], margin))
        except BadInput as error:  # a user's own mixer, without --mixer_file
            section.notes.append(f"{arm.label} is not in the table: {error}")
    lines.sort(key=lambda line: line.loss)
    section.table = table(lines, references, arms)
    found = notes(arms, verdicts, looks.baseline, margin_bpb, margin)
    found += unequal_parameters(lines, looks.baseline)
    section.notes += found[1:] if claim else found  # the first says how one look was judged
    if len(arms) > 1:
        unit = "nats per answer" if margin is None else "nats per token"
        section.figures.append(figures.differences(verdicts, looks, margin, unit))
    add_plots(section, arms, lines, looks, references)


def sentence(arms, verdicts, baseline):
    """The verdicts in one sentence, or what stands in their place."""
    reports = [record.scores["report"] for record in arm_of(baseline, arms).records]
    reached = f"loss {mean(part['loss'] for part in reports):.4f}"
    accuracy, _ = mean_and_interval([part["accuracy"] for part in reports])
    if accuracy is not None:
        reached = f"accuracy {accuracy:.3f}"
    if len(arms) == 1 and arms[0].leaks:
        return f"{baseline} leaks, its losses say nothing: {reached}."
    if len(arms) == 1:
        return f"{baseline} alone: {reached}, {in_number(len(reports), 'seed')}."
    words = {}
    for label, verdict in verdicts.items():
        words.setdefault(verdict.word, []).append(label)
    parts = [f"{word}: {', '.join(words[word])}" for word in ORDER if word in words]
    seeds = {verdict.seeds for label, verdict in verdicts.items() if label != baseline}
    span = in_number(max(seeds), "seed")
    if len(seeds) > 1:
        span = f"{min(seeds)} to {span}"
    return f"Against {baseline} ({reached}; {span}): {'; '.join(parts)}."


def in_number(count, what):
    return f"1 {what}" if count == 1 else f"{count:,} {what}s"


def table(lines, references, arms):
    """Rows {column: text}: of the arms, best first, then of what needs no model."""
    rows = []
    for line in lines:
        row = cells(line)
        seconds = sum(record.seconds() for record in arm_of(line.mixer, arms).records)
        row["hours"] = f"{seconds / 3600:.2f}"
        if line.word in ("baseline", "leaks"):
            row["minus baseline"] = ""
        reached = "report loss" if line.accuracy is None else "accuracy"
        first = ("mixer", reached, "minus baseline", "verdict")  # all that a phone shows
        rows.append({name: row[name] for name in (*first, *row)})
    return rows + [reference_cells(reference) for reference in references]


def add_plots(section, arms, lines, looks, references):
    """Loss by position, accuracy by difficulty and loss against state, where there are any."""
    trained = []
    for arm in arms:
        records = [record for record in arm.records if not is_diverged(record)]
        if records:
            trained.append(replace(arm, records=records))
    scores = [record.scores for arm in trained for record in arm.records]
    if scores and all(of_run["by_position"] for of_run in scores):
        section.figures.append(figures.over_position(trained, looks, references))
    if scores and all(of_run["by_cell"] for of_run in scores):
        section.figures.append(figures.over_cells(trained, looks))
    with_state = [line for line in lines if line.state_bytes is not None]
    if with_state:
        section.figures.append(figures.over_state(with_state, looks))
    without = [line.mixer for line in lines if line.state_bytes is None]
    if without:
        section.notes.append(f"bytes of state are not known of {', '.join(without)}")


def loss_over_rate(runs, arms, baseline):
    """The loss on the data to choose by over the learning rate, and what was chosen."""
    tuning = tuning_arms_of(runs.tuning)
    if runs.claim:
        runs.claim.name_arms(tuning)
    looks = figures.Looks(tuning, baseline)
    losses, chosen = {}, {}
    for arm in tuning:
        losses[arm.label] = {rate_of(record): record.scores["select"]["loss"]
                             for record in arm.records if record.scores["select"]}
        rates = [other.config["learning_rate"] for other in arms if other.mixer == arm.mixer]
        chosen[arm.label] = rates
    return figures.over_rate(losses, chosen, looks)


# What runs, and what was run -----------------------------------------------------------------

def status(runs):
    """What runs now and how long it will take, a list of lines."""
    lines = []
    running = [record for record in runs.others if is_running(record)]
    for record in runs.others:
        done, steps = steps_done(record), record.config["max_iters"]
        if done >= steps:
            so = f"not scored: python -m tools.score --out_dir={record.source}"
            if record in running:
                so = "is being scored"
            lines.append(f"{record.name}: trained to its end, {so}")
            continue
        state = "runs" if record in running else "stopped or waiting"
        line = f"{record.name}: {state}, step {done:,} of {steps:,}"
        if record in running and done:
            left = record.seconds() / done * (steps - done)
            line += f", {time_left(left)}"
        lines.append(line)
    if runs.sweep:
        lines += status_of_sweep(runs, max(1, len(running)))
    return lines


def status_of_sweep(runs, at_once):
    """What a sweep lacks and how long that will take, as its runs took and `at_once` at a time."""
    lines = [f"failed: {name}: {error}" for name, error in runs.sweep.failed.items()]
    missing = set(runs.sweep.missing) - runs.sweep.failed.keys()
    waiting = missing - {record.name for record in runs.others}
    if missing:
        line = f"{in_number(len(missing), 'run')} of the sweep missing"
        times = [record.seconds() for record in runs.finished + runs.tuning]
        if times and waiting:
            left = time_left(len(waiting) * mean(times) / at_once)
            line += f", {len(waiting)} not started, {at_once} at a time: {left}"
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
            options.append(f"{name}={shortened(json.dumps(value))}")
    hours = sum(record.seconds() for record in records) / 3600
    found = {"runs": f"{len(records)}, {hours:.2f} hours of training and evaluation in all"}
    for key in ("git", "machine", "torch", "threads"):  # those that this version recorded
        values = {str(record.config[key]) for record in records if record.config.get(key)}
        if values:
            found[key] = ", ".join(sorted(values))
    checksums = {json.dumps(record.config.get("data_sha256")) for record in records}
    found["checksums of the data"] = "; ".join(sorted(checksums - {"null"})) or "not recorded"
    found["options that all runs have"] = ", ".join(options)
    return found
