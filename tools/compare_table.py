"""The table of tools/compare.py: a line for each arm, what puts their losses into their place, and
what stands below."""
import csv
import io
import math
from dataclasses import asdict, dataclass, fields
from statistics import mean, median
from typing import Optional

import torch

from base.errors import BadInput, printable
from base.terminal import coloured, fitting
from mixers import has_effect
from model import GPT, model_config
from tools.compare_arms import judge_arms
from tools.ngrams import reference_lines
from tools.records import is_records_file
from tools.score import DTYPES
from tools.verdicts import ALPHA, STRETCHES, in_words, interval, margin_in_nats

LARGEST = 2**31  # parameters of a model that is built to be counted
SOLVED = 0.95    # the accuracy from which on a seed has solved a recall task
LEARNED = 0.9    # that which says when it was learned
LEFT = ("mixer", "verdict")  # columns of text
SECOND = ("seeds", "solved", f"steps to {LEARNED}", "lr", "parameters", "bits/byte",
          "T to 2 T", "3 T to 4 T", "state bytes", "MFLOP/token",
          "tokens/s")  # what a terminal shows beside the four that matter most
COLOURS = {"better": "green", "worse": "red", "equivalent": "blue", "leaks": "red",
           "undecided": "quiet", "one seed": "quiet"}  # of verdicts, in a terminal


# The lines ------------------------------------------------------------------------------------

@dataclass
class TableLine:
    """An arm's figures, as table.csv has them: medians of what a machine does, means of losses (in
    nats) and half the widths of their 95 % intervals over the seeds. None: there is none."""
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
    loss_to_2T: Optional[float]  # of tokens behind T to 2 T others of their window, T as trained
    loss_to_4T: Optional[float]  # behind 3 T to 4 T
    accuracy: Optional[float]
    accuracy_interval: Optional[float]
    solved: Optional[int]      # seeds, of a recall task
    steps_to_learn: Optional[float]  # the median seed's, to LEARNED; None if it never did
    difference: float          # of the seeds that the baseline has too
    difference_low: Optional[float]
    difference_high: Optional[float]
    margin: Optional[float]    # in nats; None: of a recall task
    word: str                  # of its Verdict, like what follows
    within_margin: bool
    missing: Optional[str]
    paired_seeds: int
    blocks: int


def line_of(arm, verdict, margin=None):
    """The TableLine of an Arm and its Verdict; the margin in nats that it was judged by."""
    config = model_config_of(arm.records[0])
    model = build(config, arm.records[0])
    val_losses = arm.final_val_losses()
    losses = arm.reported("loss")
    bpb, bpb_interval = mean_and_interval(arm.reported("bpb"))
    accuracies = arm.reported("accuracy")
    accuracy, accuracy_interval = mean_and_interval(accuracies)
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
        loss_to_2T=arm.beyond(1),
        loss_to_4T=arm.beyond(3),
        accuracy=accuracy,
        accuracy_interval=accuracy_interval,
        solved=None if accuracy is None else sum(a >= SOLVED for a in accuracies),
        steps_to_learn=median_or_never(arm.steps_to(LEARNED)),
        difference=verdict.difference,
        difference_low=verdict.difference_low,
        difference_high=verdict.difference_high,
        margin=margin,
        word=verdict.word,
        within_margin=verdict.within_margin,
        missing=verdict.missing,
        paired_seeds=verdict.seeds,
        blocks=verdict.blocks,
    )


def model_config_of(record):
    """The GPTConfig of a run. BadInput if its options do not hold together."""
    source = record.source
    if not is_records_file(source):
        source = source / "config.json"
    return model_config({**record.config, "vocab_size": record.scores["vocab_size"]}, source)


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


def median_or_never(steps):
    """The median of steps, of which None is never, or None if that is never, or there are none."""
    middle = median(math.inf if s is None else s for s in steps) if steps else math.inf
    return None if math.isinf(middle) else middle


def mean_and_interval(values):
    """(None, None) if one is missing."""
    if None in values:
        return None, None
    return mean(values), interval(values)


@dataclass
class Reference:
    """What is reached without a model, on the same data: by counting, or by guessing."""
    name: str
    loss: float            # nats per target
    bpb: Optional[float]
    difference: float      # from the baseline's mean report loss


def references_of(arm):
    """The References that an Arm, the baseline, and all that is compared with it are seen
    against."""
    record = arm.steady
    nats_per_bit = margin_in_nats(1.0, record.scores)
    baseline = mean(arm.reported("loss"))
    found = []
    for name, loss in reference_lines(record.config, record.scores).items():
        bpb = loss / nats_per_bit if nats_per_bit else None
        found.append(Reference(name, loss, bpb, loss - baseline))
    return found


# In words -------------------------------------------------------------------------------------

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
        "T to 2 T": in_units(line.loss_to_2T, ".4f"),
        "3 T to 4 T": in_units(line.loss_to_4T, ".4f"),
        "accuracy": with_interval(line.accuracy, line.accuracy_interval),
        "solved": "n/a" if line.solved is None else f"{line.solved}/{line.seeds}",
        f"steps to {LEARNED}": in_units(line.steps_to_learn, ",.0f"),
        "minus baseline": difference,
        "verdict": in_words(line),
    }


def reference_cells(reference):
    """A Reference in words, {column: text} of the columns that it has."""
    return {
        "mixer": printable(reference.name),
        "report loss": f"{reference.loss:.4f}",
        "bits/byte": in_units(reference.bpb, ".4f"),
        "minus baseline": f"{reference.difference:+.4f}",
        "verdict": "no model",
    }


def in_units(value, form, unit=1):
    return "n/a" if value is None else format(value / unit, form)


def with_interval(value, half_width):
    if value is None:
        return "n/a"
    return f"{value:.4f}" if half_width is None else f"{value:.4f} ± {half_width:.4f}"


def columns_of(lines, references=()):
    """The table by columns, {name: its texts from the header down}, each padded to one width.
    Columns that say nothing are left out."""
    rows = [cells(line) for line in lines]
    names = [name for name in rows[0] if {row[name] for row in rows} != {"n/a"}]
    return padded(rows + [reference_cells(reference) for reference in references], names)


def padded(rows, names):
    """Rows, {column: text}, by columns, {name: texts from the header down, of one width}."""
    columns = {}
    for name in names:
        texts = [name, *(row.get(name, "") for row in rows)]
        width = max(map(len, texts))
        left = name in LEFT
        columns[name] = [text.ljust(width) if left else text.rjust(width) for text in texts]
    return columns


def table(lines, references=()):
    """The TableLines, then the References, as a Markdown table, aligned."""
    columns = []
    for name, texts in columns_of(lines, references).items():
        width = len(texts[0])
        rule = "-" * width if name in LEFT else "-" * (width - 1) + ":"
        columns.append([texts[0], rule, *texts[1:]])
    return "\n".join("| " + " | ".join(row) + " |" for row in zip(*columns))


def table_for_terminal(lines, width, references=()):
    """The table in `width` characters: mixer, loss, difference and verdict, as short as they must
    be, and then as many of the other columns as there is room for. Verdicts are in colour."""
    columns = columns_of(lines, references)
    reached = "report loss" if lines[0].accuracy is None else "accuracy"
    first = ("mixer", reached, "minus baseline", "verdict")
    names = fitting({name: len(columns[name][0]) for name in columns}, width, (*first, *SECOND))
    if not set(first) <= set(names):
        columns = short_columns(lines, references, width)
        names = list(columns)
    words = [None, *(line.word for line in lines), *(None for _ in references)]
    rows = []
    for row, word in zip(zip(*(columns[name] for name in names)), words):
        cells_of_row = dict(zip(names, row))
        cells_of_row["verdict"] = coloured(cells_of_row["verdict"], COLOURS.get(word))
        rows.append("  ".join(cells_of_row.values()).rstrip())
    return "\n".join(rows)


def short_columns(lines, references, width):
    """The four columns that matter most: figures without their intervals or with fewer digits,
    names cut off where they must be."""
    reached = "loss" if lines[0].accuracy is None else "accuracy"
    rows = []
    for line in lines:
        value = line.loss if line.accuracy is None else line.accuracy
        difference = f"{line.difference:+.3f}"
        if line.difference_low is not None:
            difference += f" [{line.difference_low:+.3f}, {line.difference_high:+.3f}]"
        rows.append({"mixer": printable(line.mixer), reached: f"{value:.4f}",
                     "minus baseline": difference, "verdict": in_words(line)})
    for row in map(reference_cells, references):
        rows.append(row | {"loss": row["report loss"]})
    columns = padded(rows, ("mixer", reached, "minus baseline", "verdict"))
    others = sum(len(columns[name][0]) + 2 for name in columns if name != "mixer")
    room = max(10, width - others)
    if len(columns["mixer"][0]) > room:
        columns["mixer"] = [cut(text, room) for text in columns["mixer"]]
    return columns


def cut(text, room):
    text = text.rstrip()
    return text.ljust(room) if len(text) <= room else text[:room - 1] + "…"


def csv_of(lines, references=()):
    """The bytes of table.csv: names as they are; a Reference has the word "no model"."""
    content = io.StringIO()
    writer = csv.DictWriter(content, [f.name for f in fields(TableLine)], lineterminator="\n")
    writer.writeheader()
    writer.writerows(asdict(line) for line in lines)
    for reference in references:
        row = {"mixer": reference.name, "loss": reference.loss, "bpb": reference.bpb,
               "difference": reference.difference, "word": "no model"}
        writer.writerow(row)
    return content.getvalue().encode(errors="backslashreplace")


# Below the table ------------------------------------------------------------------------------

def notes(arms, verdicts, baseline, margin_bpb, margin):
    """What stands below the table, a list of lines. margin: margin_bpb in nats; None: of a recall
    task."""
    found = [how_it_was_judged(arms, verdicts, baseline, is_text=margin is not None)]
    if margin is not None:
        found.append(f"equivalent: within {margin_bpb:g} bits per byte, {margin:.4f} nats")
    found.append("tokens/s, peak MiB and seconds are as the machine was then; "
                 "for speed see bench.py")
    for name in arms[0].settings:
        found.append(f"not equal: {name} is {values_in_words(arms, name)}")
    found += asked_alone(arms, verdicts, baseline, margin)
    return [printable(note) for note in found + what_to_know(arms, verdicts, baseline)]


def unequal_parameters(lines, baseline):
    """The arms with over 2 % more or fewer parameters than the baseline's; a list of one note or
    none."""
    own = [line.parameters for line in lines if line.mixer == baseline]
    found = []
    for line in lines:
        percent = 100 * (line.parameters / own[0] - 1) if own else 0.0
        if abs(percent) > 2:
            found.append(f"{line.mixer} {percent:+.1f} %")
    return [f"not equal: parameters, against {baseline}: {', '.join(found)}"] if found else []


def asked_alone(arms, verdicts, baseline, margin):
    """The arms that would have another word if each were the only one compared, and which; a list
    of one note or none."""
    words = {}
    for label, alone in judge_arms(arms, baseline, margin, comparisons=1).items():
        if alone.word != verdicts[label].word:
            interval = f"[{alone.difference_low:+.4f}, {alone.difference_high:+.4f}]"
            words.setdefault(alone.word, []).append(f"{label} {interval}")
    texts = [f"{word}: {', '.join(labels)}" for word, labels in words.items()]
    return ["asked alone, with the whole error for each: " + "; ".join(texts)] if texts else []


def how_it_was_judged(arms, verdicts, baseline, is_text):
    compared = [label for label in verdicts if label != baseline]
    m = sum(verdicts[label].word != "leaks" for label in compared)
    blocks = max([verdicts[label].blocks for label in compared], default=1)
    over = "over seeds alone"
    if blocks > 1:
        by_author = any(record.scores.get("authors") for arm in arms for record in arm.records)
        kind = "authors, each counted alike" if by_author else "blocks of text"
        over = f"over seeds and {blocks} {kind}"
    elif is_text:
        over = "over seeds alone, the text is not counted"
    steps = in_range([arm.config["max_iters"] for arm in arms])
    shared = f" for all {m} comparisons together" if m > 1 else ""
    return (f"{steps} steps; each seed against that of {baseline}, {over}, "
            f"with an error of {ALPHA:g}{shared}, for one look")


def in_range(counts):
    """5, or 3 to 5, of a list of numbers."""
    low, high = min(counts), max(counts)
    return f"{low:,}" if low == high else f"{low:,} to {high:,}"


def what_to_know(arms, verdicts, baseline):
    """The notes on arms whose figures need one."""
    found = []
    together = [f"{label} {verdict.autocorrelation:+.2f}" for label, verdict in verdicts.items()
                if verdict.joined]
    if together:
        found.append(f"neighbouring blocks of text differ alike, so {STRETCHES} long stretches are "
                     f"compared (autocorrelation of the blocks: {', '.join(together)})")
    alone = [f"{arm.label} {verdicts[arm.label].seeds} of {len(arm.records)}" for arm in arms
             if verdicts[arm.label].seeds < len(arm.records)]
    if alone:
        found.append(f"the difference is of the seeds that {baseline} has too: {', '.join(alone)}")
    diverged = [f"{arm.label} {arm.diverged} of {len(arm.records)}" for arm in arms if arm.diverged]
    if diverged:
        found.append(f"runs that diverged count with the loss of an even guess: "
                     f"{', '.join(diverged)}")
    leaking = [arm.label for arm in arms if arm.leaks]
    if leaking:
        found.append("trained with --allow_leak, losses may not be compared: " + ", ".join(leaking))
    return found


def values_in_words(arms, option_name):
    """Which arms have which value of an option; those on which it has no effect are left out."""
    labels = {}
    for arm in arms:
        if has_effect(option_name, arm.mixer, arm.config.get("n_layer", 1)):
            labels.setdefault(arm.settings[option_name], []).append(arm.label)
    return "; ".join(f"{value} for {', '.join(those)}" for value, those in labels.items())
