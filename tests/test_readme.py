"""Every command of the README, docs/results.md and docs/runs.md runs, shortened, in order, in a
copy of the repository; every table and difference in them is that of the records."""
import json
import math
import re
import shlex
import shutil
import subprocess
import sys
from statistics import mean, median

import pytest
import torch
from conftest import ROOT, copy_repository
from scipy.stats import spearmanr

from base.command_line import parse_options
from bench import BenchOptions
from config import Options
from data import load_dataset
from mixers import MIXERS
from tools import (
    bench_table, claim_record, compare, compare_table, context, ladder, replace_record,
    replace_table)
from tools.records import read_records
from tools.sweep import SweepOptions
from tools.verdicts import MARGIN_BPB, Verdict, judge
from training.run_folder import read_options

HYBRID = "gated_deltanet,gated_deltanet,gated_deltanet,softmax"
SHORTER = {  # a word of a command: what is added to it
    "train.py": "--max_iters=2 --eval_tokens=3000",
    "sample.py": "--num_samples=1 --max_new_tokens=20",
    "tools.inspect_attention": "--length=16",
    "--mixers=causal_max_leak": "--max_iters=2 --eval_tokens=3000 --seeds=1",
    "--linformer_segment":
        "--max_iters=2 --eval_tokens=3000 --seeds=1 --mixers=softmax,linformer",
    "tools.audit": "--quick",
    "--deltanet_negative":
        "--max_iters=2 --eval_tokens=3000 --seeds=1 --tune= --learning_rate=1e-3",
    "tools.sweep": "--max_iters=2 --eval_tokens=3000 --seeds=1 --mixers=softmax,pelican "
                   "--tune= --learning_rate=1e-3",
    "tools.verdicts": "--tables=20",
    "tools.pelican_figure":
        "--dataset=shakespeare_char --max_iters=1 --batch_size=1 --eval_tokens=1000",
    "--rounds=3": "--lengths=16 --rounds=1 --seconds=0.01 --mixers=softmax,lln --out_dir=out/b",
    "bench.py": "--lengths=16,32 --mode=prefill --rounds=1 --seconds=0.01",
}
# several trainings or evaluations, however short, or the pictures of many runs
LONG = ("tools.compare results/", "tools.report results/", "tools.pelican_figure", "leak",
        "out/strong", "configs/shakespeare_long.py", "--linformer_segment", "tools.sweep",
        "out/sweeps/shakespeare", "torchrun", "tools.verdicts", "tools.claim claims", "--rounds=3",
        "configs/mqar.py", "out/mqar_lln", "tools.context")
TEXT = "\n".join((ROOT / name).read_text()
                 for name in ("README.md", "docs/results.md", "docs/runs.md"))


def blocks(language, text=TEXT):
    return re.findall(rf"^```{language}\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)


def commands():
    """Each once, in the order of the pages."""
    found = []
    for block in blocks("sh"):
        for line in block.splitlines():
            found += [command.strip() for command in line.split("&&")]
    return list(dict.fromkeys(found))


def is_long(command):
    return any(word in f"{command} " for word in LONG)


def test_the_two_commands_for_newcomers_are_there():
    train = "python train.py configs/shakespeare_pelican.py"
    assert f"pip install -r requirements.txt && {train}" in TEXT
    install = "pip install -r requirements.txt -r requirements-dev.txt"
    assert f"{install} && python -m pytest" in TEXT


def test_every_mixer_and_every_file_named_is_there():
    named = re.findall(r"(?:configs|mixers|tools|examples|docs)/\w+\.\w+", TEXT)
    assert [name for name in named if not (ROOT / name).exists()] == []
    table = re.findall(r"^\| (`.*?`) \|", TEXT, re.MULTILINE)
    listed = {name for row in table for name in re.findall(r"`(\w+)`", row)} - {"mixer"}
    assert listed == set(MIXERS)


def tables(first_cell):
    """The tables whose header begins with first_cell: each a list of {column: cell}."""
    pattern = rf"^\| ({first_cell} \|.*) \|\n\|[-|: ]+\|\n((?:\|.*\n)+)"
    for header, body in re.findall(pattern, TEXT, re.MULTILINE):
        names = [name.strip() for name in header.split("|")]
        rows = []
        for line in body.splitlines():
            cells = [cell.strip() for cell in line.strip("|").split("|")]
            rows.append(dict(zip(names, cells)))
        yield rows


def arms(name):
    records = compare.records_to_compare([ROOT / "results" / name], torch.device("cpu"))
    return compare.arms_of(records)


@pytest.mark.parametrize("first_cell, name", [
    ("mixer", "shakespeare"), ("untuned demo", "shakespeare_nanogpt"),
    ("stronger start", "shakespeare_strong"),
    ("longer recipe", "shakespeare_long")])
def test_the_results_are_those_of_the_records(first_cell, name):
    of_records = arms(name)
    margin = compare.margin_of(of_records, "softmax", MARGIN_BPB)
    verdicts = compare.judge_arms(of_records, "softmax", margin)
    cells = {}
    for arm in of_records:
        cells[arm.label] = compare_table.cells(compare.line_of(arm, verdicts[arm.label], margin))
    [rows] = tables(first_cell)
    lines = {"unigram", "7-gram interpolated"} if first_cell == "mixer" else set()
    assert {row[first_cell] for row in rows} == set(cells) | lines
    for row in rows:
        if row[first_cell] in lines:
            continue
        label = row.pop(first_cell)
        assert row == {column: cells[label][column] for column in row}


def test_the_recall_table_is_that_of_the_records():
    [rows] = tables("recall")
    for task in set(rows[0]) - {"recall"}:
        in_table = {row["recall"]: row[task] for row in rows}
        in_records = {}
        for arm in arms(task):
            low, middle, high = sorted(arm.reported("accuracy"))
            in_records[arm.label] = f"{(low + middle + high) / 3:.2f} ({low:.2f} to {high:.2f})"
        assert in_table == in_records, task


def check_the_table(first_cell, names, baseline):
    """That of the records of that name; returns the verdicts."""
    paths = [ROOT / "results" / name for name in names]
    of_records = compare.arms_of(compare.records_to_compare(paths, torch.device("cpu")))
    margin = compare.margin_of(of_records, baseline, MARGIN_BPB)
    verdicts = compare.judge_arms(of_records, baseline, margin)
    cells = {arm.label: compare_table.cells(compare.line_of(arm, verdicts[arm.label], margin))
             for arm in of_records}
    [rows] = tables(first_cell)
    assert {row[first_cell] for row in rows} == set(cells)
    for row in rows:
        label = row.pop(first_cell)
        assert row == {column: cells[label][column] for column in row}
    return verdicts


def test_the_table_of_the_arms_that_came_later_is_that_of_the_records():
    verdicts = check_the_table(
        "later arms", ["shakespeare/softmax.jsonl.gz", "shakespeare_later"], "softmax")
    assert verdicts["retnet"].word == "worse"


def test_the_table_of_many_pairs_is_that_of_the_records():
    verdicts = check_the_table("mqar", ["mqar", "mqar_softmax"], "softmax learning_rate=0.004")
    words = {}
    for label, verdict in verdicts.items():
        words.setdefault(verdict.word, []).append(label.partition(" ")[0])
    assert words == {"baseline": ["softmax"], "worse": ["gla", "linear", "swa"],
                     "undecided": ["gated_deltanet", "lln", "mamba2", "softmax"],
                     "better": ["deltanet"]}


def test_the_table_with_the_convolution_for_all_is_that_of_the_records():
    names = ["claims/deltanet_recalls", "mqar_conv"]
    check_the_table("mqar, convolution for all", names, "deltanet")
    check_the_table("overwrite, convolution for all", ["overwrite"], "softmax")


def test_the_table_of_permutations_is_that_of_the_records():
    paths = [ROOT / "results" / name for name in ("s3", "s3_negative")]
    cells, beyond = {}, []
    of_records = compare.arms_of(compare.records_to_compare(paths, torch.device("cpu")))
    verdicts = compare.judge_arms(of_records, "softmax")
    for arm in of_records:
        cells[arm.label] = compare_table.cells(compare.line_of(arm, verdicts[arm.label]))
        for name, asked in (("16", "16 asked_from=1"), ("17 to 32", "32 asked_from=17")):
            for moves, n in (("swaps", 4), ("all moves", 6)):
                right = [record.scores["by_cell"][f"length={asked} moves={n}"]
                         for record in arm.records]
                cells[arm.label][f"{name}, {moves}"] = f"{mean(right):.2f}"
                if name != "16" and not arm.label.endswith("negative=true"):
                    beyond += right
    [rows] = tables("S3, convolution for all")
    assert len(rows) == len(cells) == 9
    for row in rows:
        label = row.pop("S3, convolution for all")
        assert row == {column: cells[label][column] for column in row}
    assert f"{min(beyond):.2f} to {max(beyond):.2f} beyond in every seed" in TEXT
    assert f"({min(beyond):.2f} to {max(beyond):.2f} right" in TEXT  # README
    # of the delta rule that may turn signs two seeds more, of its card
    of_card = claim_record.arms_of(claim_record.recorded(ROOT / "results/claims/negative_s3"))
    of_moves = []
    for n in (4, 6):
        cell = f"length=32 asked_from=17 moves={n}"
        right = [record.scores["by_cell"][cell] for record in of_card["negative"].values()]
        of_moves.append(sorted(f"{value:.2f}" for value in right))
    swaps, turns = of_moves
    assert len(swaps) == 5
    text = " ".join(TEXT.split())
    assert f"with each of five seeds {swaps[0]} to {swaps[-1]} of swaps; with turns among them " \
        f"{', '.join(turns[:-1])} and {turns[-1]}" in text


@pytest.mark.parametrize("label", ["causal_max", "mamba2", "lln", "pelican"])
def test_the_differences_of_the_headline_are_those_of_the_records(label):
    of_records = arms("shakespeare")
    found = compare.judge_arms(of_records, "softmax", 0.02)[label]
    words = f"{found.difference:+.3f} [{found.difference_low:+.3f}, {found.difference_high:+.3f}]"
    assert words in TEXT, words


def words_of(verdict):
    low, high = verdict.difference_low, verdict.difference_high
    return f"{verdict.difference:+.3f} [{low:+.3f}, {high:+.3f}]"


def test_the_table_without_rope_is_that_of_the_records():
    folders = [ROOT / "results/shakespeare", ROOT / "results/shakespeare_positions"]
    of_records = compare.arms_of(compare.records_to_compare(folders, torch.device("cpu")))
    baseline = "softmax pos=learned"
    margin = compare.margin_of(of_records, baseline, MARGIN_BPB)
    verdicts = compare.judge_arms(of_records, baseline, margin)
    cells = {arm.label: compare_table.cells(
        compare.line_of(arm, verdicts[arm.label], margin)) for arm in of_records}
    [rows] = tables("against softmax with learned positions")
    assert len(rows) == 12
    for row in rows:
        label = row.pop("against softmax with learned positions")
        assert row == {column: cells[label][column] for column in row}
    for label in ("causal_max", "lln"):
        assert verdicts[label].word == "undecided"
        assert words_of(verdicts[label]) in " ".join(TEXT.split())


def of_mixers(name, *mixers):
    return [f"{name}/{mixer}.jsonl.gz" for mixer in mixers]


def test_the_tables_of_the_convolution_are_those_of_the_records():
    later, own = "shakespeare_conv_later", "shakespeare"
    of_all = check_the_table("convolution for all", [
        "shakespeare_conv", *of_mixers(later, "lln", "linear", "gla"),
        *of_mixers(own, "mamba2", "deltanet", "gated_deltanet")], "softmax")
    of_none = check_the_table("convolution for none", [
        *of_mixers(own, "softmax", "swa", "lln", "linear", "gla"),
        *of_mixers(later, "mamba2", "deltanet", "gated_deltanet")], "softmax")
    text = " ".join(TEXT.split())
    told = [(of_all, "mamba2", "undecided"), (of_all, "gated_deltanet", "worse"),
            (of_none, "mamba2", "worse")]
    for verdicts, label, word in told:
        assert verdicts[label].word == word and words_of(verdicts[label]) in text
    [rows] = tables("convolution")
    assert {row["convolution"] for row in rows} == set(of_all) == set(of_none)
    for row in rows:
        mixer = row["convolution"]
        more = "shakespeare_conv" if mixer in ("softmax", "swa") else later
        paths = [ROOT / "results" / name / f"{mixer}.jsonl.gz" for name in (own, more)]
        pair = compare.arms_of(compare.records_to_compare(paths, torch.device("cpu")))
        without, with_it = sorted(pair, key=lambda arm: -mean(arm.reported("loss")))
        for arm, column in ((without, "without, at its rate"), (with_it, "with, at its rate")):
            loss = mean(arm.reported("loss"))
            assert row[column] == f"{loss:.4f} ({arm.config['learning_rate']:g})"
        margin = compare.margin_of(pair, without.label, MARGIN_BPB)
        found = compare.judge_arms(pair, without.label, margin)[with_it.label]
        low, high = found.difference_low, found.difference_high
        assert row["gained by it"] == f"{found.difference:+.4f} [{low:+.4f}, {high:+.4f}]"


def test_the_losses_beyond_the_trained_length_are_those_of_the_records():
    [rows] = tables("beyond 64 characters, no convolution")
    assert len(rows) == 3
    for row in rows:
        mixer, *cells = row.values()
        [arm] = [arm for arm in arms("shakespeare_conv_later") if arm.mixer == mixer]
        assert cells == [f"{arm.beyond(stretch):.3f}" for stretch in range(4)]


def test_what_is_said_of_the_books_is_that_of_the_records():
    verdicts = check_the_table("books, 0.2M", ["claims/books_small"], "softmax")
    words = {label: verdict.word for label, verdict in verdicts.items()}
    worse = {label for label, word in words.items() if word == "worse"}
    assert worse == {"causal_max", "lln_diag"}
    assert set(words.values()) == {"baseline", "equivalent", "worse"}
    told = {"gated_deltanet": "{0:+.3f} [{1:+.3f}, {2:+.3f}] nats a token",
            "causal_max": "`causal_max` ({0:+.3f})", "lln_diag": "`lln_diag` ({0:+.3f})"}
    for label, form in told.items():
        found = verdicts[label]
        assert form.format(found.difference, found.difference_low, found.difference_high) in TEXT
    content = context.read_context(ROOT / "results/claims/books_small/context.json",
                                   context.ContextOptions(), set())
    lines = context.tables(arms("claims/books_small"), content, "softmax")
    assert len(lines) == 42 and [line for line in lines if line not in TEXT] == []
    [row] = [line for line in lines[-18:-10] if line.startswith("| gated_deltanet |")]
    at_4096 = row.strip("| ").split(" | ")[-1].removesuffix(" better")
    assert f"it is {at_4096} bits per byte" in TEXT


def gained_by_reading_again(name):
    """{arm: [bits per byte that each seed gains by a second reading]}"""
    content = context.read_context(ROOT / "results" / name / "context.json",
                                   context.ContextOptions(), set())
    bits = 1 / math.log(2) / content["bytes_per_token"]
    gained = {}
    for arm in arms(name):
        readings = [content["runs"][record.name]["readings"] for record in arm.records]
        gained[arm.label] = [(mean(once) - mean(again)) * bits for once, again in readings]
    return gained


def test_one_head_at_the_small_size_is_as_told():
    losses = {}
    for name in ("claims/books_small", "books_small_heads"):
        for arm in arms(name):
            losses |= {(arm.label, name): record.scores["report"]["loss"]
                       for record in arm.records if record.config["seed"] == 1}
    apart = {label: losses[label, "books_small_heads"] - losses[label, "claims/books_small"]
             for label in ("softmax", "gated_deltanet")}
    assert (f"is {apart['softmax']:.4f} worse for softmax and {-apart['gated_deltanet']:.4f} "
            "better for `gated_deltanet`") in TEXT


def test_what_is_said_of_the_middle_size_is_that_of_the_records():
    small, medium = "claims/books_small", "claims/books_medium"
    verdicts = check_the_table("books, 0.8M", [medium], "softmax")
    assert {label: found.word for label, found in verdicts.items()} == {
        "softmax": "baseline", "swa": "equivalent", "gated_deltanet": "worse"}
    # which is lowest, step by step and seed by seed
    by_step = {}
    for arm in arms(medium):
        for record in arm.records:
            for row in record.metrics:
                if row["val_loss"] is not None:
                    losses = by_step.setdefault((row["iter"], record.config["seed"]), {})
                    losses[arm.label] = row["val_loss"]
    lowest = {key: min(losses, key=losses.get) for key, losses in by_step.items()}
    assert lowest == {
        (step, seed): "gated_deltanet" if step < 2880 else "swa" if seed == 5 else "softmax"
        for step in (960, 1920, 2880, 3840) for seed in (1, 2, 3, 4, 5)}
    content = context.read_context(ROOT / "results" / medium / "context.json",
                                   context.ContextOptions(), set())
    lines = context.tables(arms(medium), content, "softmax")
    gained = gained_by_reading_again(medium)
    low, high = min(gained["softmax"]), max(gained["softmax"])
    assert (f"Softmax gains {mean(gained['softmax']):.3f} bits per byte by the second reading, "
            f"{low:.3f} to {high:.3f} from seed to seed, the window {mean(gained['swa']):.3f}, "
            f"`gated_deltanet` {mean(gained['gated_deltanet']):.3f}") in TEXT
    assert (f"softmax gains {mean(gained['softmax']):.3f} bits per byte there, a window "
            f"{mean(gained['swa']):.3f}, `gated_deltanet` {mean(gained['gated_deltanet']):.3f}"
            ) in TEXT
    at_most = max(map(mean, gained_by_reading_again(small).values()))
    assert f"at 0.2M nobody more than {at_most:.3f}" in TEXT
    options = ladder.LadderOptions()
    rungs = [ladder.rungs_of(ROOT / "results" / name, options)[0] for name in (small, medium)]
    lines += [line for line in ladder.lines_of(rungs) if line.startswith("|")]
    folders = [ROOT / "results" / name for name in ("books_small", small, "books_medium_short")]
    lines += ladder.lines_of_rates(compare.tuning_records(folders))
    assert len(lines) > 30
    assert [line for line in lines if line.replace("| --- ", "|---") not in TEXT
            and "---" not in line] == []


def test_what_is_said_of_read_and_unread_authors_is_that_of_the_records():
    """Late in training, and in the report; each token counted alike."""
    late, reported = {}, {}
    [hybrid] = [arm for arm in arms("claims/books_medium_heads") if "+" in arm.label]
    for arm in [*arms("claims/books_medium"), hybrid]:
        late[arm.label], reported[arm.label] = {}, {}
        for record in arm.records:
            losses = [row["train_loss"] for row in record.metrics
                      if row["train_loss"] is not None and row["iter"] > 2880]
            assert len(losses) == 10
            late[arm.label][record.config["seed"]] = [mean(losses)]
            reported[arm.label][record.config["seed"]] = [record.scores["report"]["loss"]]

    def words(one, other):
        found = judge({"one": one, "other": other}, "other", None, 1)["one"]
        interval = f"[{found.difference_low:+.4f}, {found.difference_high:+.4f}]"
        return f"{found.difference:+.4f}", interval

    def apart(losses, label):
        return {seed: [losses[label][seed][0] - losses["softmax"][seed][0]]
                for seed in losses[label]}
    read = words(late["gated_deltanet"], late["softmax"])
    unread = words(reported["gated_deltanet"], reported["softmax"])
    more = words(apart(reported, "gated_deltanet"), apart(late, "gated_deltanet"))
    text = " ".join(TEXT.split())
    for (value, interval), form in ((read, "{} {} over the five seeds"),
                                    (unread, "make it {} {}"),
                                    (more, "the second minus the first {} {}")):
        assert form.format(value, interval) in text
    window = [words(losses["swa"], losses["softmax"])[0] for losses in (late, reported)]
    more = words(apart(reported, "swa"), apart(late, "swa"))
    assert f"For the window it is {window[0]}, {window[1]} and {' '.join(more)}" in text
    below = mean(losses[0] - late[hybrid.label][seed][0]
                 for seed, losses in late["softmax"].items() if seed in late[hybrid.label])
    assert f"it is {below:.3f} below softmax with the same heads and seeds" in text


def test_what_else_was_tried_at_the_middle_size_is_that_of_the_records():
    """Other rates and heads than the card's, against the same seeds of it, and a hybrid."""
    folders = "claims/books_medium", "books_medium_more", "claims/books_medium_heads"
    losses, flops = {}, {}
    for name in folders:
        for arm in arms(name):
            if arm.label == "softmax pos=none":
                continue
            for record in arm.records:
                config = record.config
                key = config["mixer"], config["learning_rate"], config["n_head"]
                losses.setdefault(key, {})[config["seed"]] = record.scores["report"]["loss"]
                flops[key] = record.metrics[-1]["flops"]
    text = " ".join(TEXT.split())

    def same_seeds(arm, other):
        return [(losses[arm][seed], losses[other][seed]) for seed in sorted(losses[arm])]
    pairs = same_seeds(("gated_deltanet", 8e-3, 4), ("gated_deltanet", 16e-3, 4))
    half, whole = (mean(column) for column in zip(*pairs))
    assert len(pairs) == 3
    assert f"`gated_deltanet` {half:.4f}, with the same seeds at 16e-3 {whole:.4f}" in text
    (a, c), (b, d) = same_seeds(("softmax", 8e-3, 4), ("softmax", 16e-3, 4))
    assert f"softmax {a:.4f} and {b:.4f} with two, at 16e-3 {c:.4f} and {d:.4f}" in text
    baseline = "softmax n_head=4 n_kv_head=4"
    verdicts = check_the_table("books, 0.8M, heads", [folders[0], folders[2]], baseline)
    [hybrid] = [label for label in verdicts if "+" in label]
    alone = judge_alone(folders[0], folders[2], baseline, hybrid)
    interval = f"[{alone.difference_low:+.4f}, {alone.difference_high:+.4f}]"
    found = f"{alone.difference:+.4f}, undecided among"
    assert verdicts[hybrid].word == "undecided" and alone.word == "better"
    assert f"{found} the five comparisons, *better* if it were the only one, {interval}" in text
    assert f"{found} five comparisons, better if it were the only one {interval}" in text
    card, own = ("softmax", 16e-3, 4), (HYBRID, 16e-3, 4)
    of_seeds = [losses[own][seed] for seed in (1, 2, 3)]
    assert "with each of its three seeds: {:.4f}, {:.4f} and {:.4f}.".format(*of_seeds) in text
    [rows] = tables("books, 0.8M, heads")
    rows = {row["books, 0.8M, heads"]: row for row in rows}
    state = {label: int(row["state bytes"].replace(",", "")) for label, row in rows.items()}
    assert (f"with {state[hybrid] / state[baseline]:.2f} of the state at this length and "
            f"{flops[own] / flops[card]:.2f} of the arithmetic") in text
    apart = [float(rows["swa"][column].split()[0]) - float(rows[hybrid][column].split()[0])
             for column in ("report loss", "T to 2 T", "3 T to 4 T")]
    assert ("below the window by {:.3f} within 512 tokens, it is so by {:.3f} from 512 to 1,024 "
            "and by {:.3f} from 1,536 to 2,048").format(*apart) in text
    gains = [b - a for a, b in same_seeds(("softmax", 16e-3, 2), card)]
    told = "{:.4f} and {:.4f}; the third is {:.4f}, the mean {:.4f}"
    assert told.format(*gains, mean(gains)) in text
    pairs = same_seeds(("gated_deltanet", 16e-3, 1), ("gated_deltanet", 16e-3, 4))
    gains = [b - a for a, b in pairs]
    one, four = (f"gated_deltanet n_head={n} n_kv_head={n}" for n in (1, 4))
    more = flops["gated_deltanet", 16e-3, 1] / flops["gated_deltanet", 16e-3, 4]
    assert (f"({min(gains):.3f} to {max(gains):.3f} better with each of three seeds, "
            f"{state[one] / state[four]:.1f} times the state and {more:.2f} of the arithmetic"
            ) in text


def test_what_is_said_of_equal_time_is_that_of_the_records():
    text = " ".join(TEXT.split())
    names = "softmax", "swa", "gated_deltanet"
    seconds, tokens, apart = {}, {}, {}
    for length in (2048, 8192):
        name = f"claims/books_time_{length}"
        verdicts = check_the_table(f"books, {length:,} tokens", [name], "softmax")
        of_name = {arm.label: arm.records for arm in arms(name)}
        for label in names:
            records = of_name[label]
            seconds[length, label] = mean(record.seconds() for record in records)
            [tokens[length, label]] = {record.metrics[-1]["tokens"] for record in records}
            apart[length, label] = verdicts[label].difference
            assert len(records) == 3
        assert {verdicts[label].word for label in names[1:]} == {"better"}
    steps = [[tokens[length, label] // size for label in names]
             for length, size in ((2048, 4096), (8192, 8192))]
    assert ("takes {} steps of 4,096 tokens at 2,048 tokens of context, the window (256 tokens) "
            "{}, `gated_deltanet` {}").format(*steps[0]) in text
    assert "at 8,192 tokens {}, {} and {} steps".format(*steps[1]) in text
    at_2048, at_8192 = ([seconds[length, label] for label in names] for length in (2048, 8192))
    told = "{:.0f}, {:.0f} and {:.0f} seconds at 2,048, so the window had {:.2f} times softmax's"
    shares = [value / at_2048[0] for value in at_2048[1:]]
    assert told.format(*at_2048, shares[0]) in text
    assert (f"and `gated_deltanet` {shares[1]:.2f}; "
            "{:.0f}, {:.0f} and {:.0f} at 8,192").format(*at_8192) in text
    gains = [-apart[length, label] for length in (2048, 8192) for label in names[1:]]
    told = "by {:.2f} and {:.2f} nats at 2,048 and by {:.2f} and {:.2f} at 8,192"
    assert told.format(*gains) in text
    told = ("at 2,048 tokens of context (-{:.2f} and -{:.2f} nats) and at 8,192 "
            "(-{:.2f} and -{:.2f})")
    assert told.format(*gains) in text
    more = tokens[8192, "gated_deltanet"] / tokens[8192, "softmax"]
    assert f"reads {more:.1f} times as much text" in text
    [half] = arms("books_time_rates")
    [whole] = [record.scores["report"]["loss"] for arm in arms("claims/books_time_2048")
               for record in arm.records if arm.label == "softmax" and record.config["seed"] == 1]
    assert f"ends {half.reported('loss')[0] - whole:.4f} higher" in text
    [small] = [arm for arm in arms("claims/books_small") if arm.label == "softmax"]
    assert f"ends at {mean(small.reported('loss')):.3f}, below all of these" in text


def judge_alone(one, other, baseline, label):
    """The Verdict on an arm of two folders, as the only comparison."""
    paths = [ROOT / "results" / name for name in (one, other)]
    of_records = compare.arms_of(compare.records_to_compare(paths, torch.device("cpu")))
    margin = compare.margin_of(of_records, baseline, MARGIN_BPB)
    return compare.judge_arms(of_records, baseline, margin, comparisons=1)[label]


def test_what_is_said_of_copying_at_the_middle_size_is_that_of_the_records():
    heads = "claims/books_medium_heads"
    pairs = []  # of softmax: what a run gains by a second reading, and its loss
    for name in ("claims/books_medium", heads):
        gained = gained_by_reading_again(name)["softmax"]
        [arm] = [arm for arm in arms(name) if arm.label == "softmax"]
        pairs += zip(gained, arm.reported("loss"))
    (least, highest), (most, lowest) = min(pairs), max(pairs)
    rank = spearmanr(*zip(*pairs)).statistic
    assert (f"from {highest:.4f} at {least:.3f} bits per byte to {lowest:.4f} at {most:.3f} (rank "
            f"correlation {rank:.2f};") in " ".join(TEXT.split())
    gained = gained_by_reading_again(heads)
    [hybrid] = [values for label, values in gained.items() if "+" in label]
    low, high = min(gained["gated_deltanet"]), max(gained["gated_deltanet"])
    of_hybrid = "The hybrid gains {:.3f}, {:.3f} and {:.3f}".format(*hybrid)
    assert len(pairs) == 8
    assert f"{of_hybrid}, `gated_deltanet` with one head {low:.3f} to {high:.3f}" in TEXT
    [without] = gained_by_reading_again("books_medium_more")["softmax pos=none"]
    [apart] = [arm for arm in arms("books_medium_more") if arm.label == "softmax pos=none"]
    [loss], [card] = apart.reported("loss"), [
        record.scores["report"]["loss"] for arm in arms("claims/books_medium")
        for record in arm.records if arm.label == "softmax" and record.config["seed"] == 1]
    cells = compare_table.cells(compare.line_of(apart, Verdict(0.0), 0.0))
    assert without > most
    near, far = cells["T to 2 T"], cells["3 T to 4 T"]
    assert (f"it copies {without:.3f}, more than any of the eight, fails far less beyond 512 "
            f"tokens ({near} from 512 to 1,024, {far} from 1,536 to 2,048), and yet ends at "
            f"{loss:.4f}, {loss - card:.4f} above RoPE") in " ".join(TEXT.split())


def test_what_is_said_of_half_the_steps_is_that_of_the_records():
    losses = {"softmax": [], HYBRID: []}
    for name in ("claims/books_medium", "claims/books_medium_heads"):
        for arm in arms(name):
            for record in arm.records:
                [half] = [row["val_loss"] for row in record.metrics
                          if row["iter"] == 1920 and row["val_loss"] is not None]
                losses.setdefault(record.config["mixer"], []).append(half)
    first, *others = sorted(losses["softmax"])
    hybrid = sorted(losses[HYBRID])
    assert len(others) == 7 and len(hybrid) == 3
    of_hybrid = f"the hybrid is at {hybrid[0]:.3f} to {hybrid[-1]:.3f} with each seed"
    of_others = f"with the others at {others[0]:.3f} to {others[-1]:.3f}"
    assert (f"{of_hybrid}, softmax with one of eight at {first:.3f} and {of_others}"
            ) in " ".join(TEXT.split())


def test_mamba2_asked_alone_is_as_told():
    of_records = arms("shakespeare")
    found = compare.judge_arms(of_records, "softmax", 0.02, comparisons=1)["mamba2"]
    words = f"{found.difference:+.3f} [{found.difference_low:+.3f}, {found.difference_high:+.3f}]"
    assert found.word == "better" and TEXT.count(words) == 2  # README and results.md


def test_what_arms_gain_by_position_is_that_of_the_records():
    losses = {}
    for arm in arms("shakespeare"):
        losses[arm.label] = {record.config["seed"]: record.scores["by_position"]
                             for record in arm.records}
    [rows] = tables("positions")
    assert len(rows) == 4
    for row in rows:
        own = losses[row.pop("positions")]
        gains = [[a - b for a, b in zip(losses["causal_max"][seed], own[seed])] for seed in own]
        for columns, cell in row.items():
            first, last = map(int, columns.split(" to "))
            assert f"{mean(mean(gain[first - 1:last]) for gain in gains):+.3f}" == cell


def test_the_replaced_attention_is_that_of_the_record():
    record = replace_record.read_record(ROOT / "results/smollm2_replace")
    printed = [line.rstrip() for line in replace_table.table(record).splitlines()]
    text = TEXT[TEXT.index("python -m tools.replace --table"):]
    told = re.search(r"^```\n(bits per byte.*?)```", text, re.DOTALL | re.MULTILINE).group(1)
    lines = [line.rstrip() for line in told.splitlines() if line]
    assert len(lines) > 16 and not set(lines) - set(printed)
    readme = (ROOT / "README.md").read_text()
    for arm, k in (("swa_64_sinks", 30), ("lln", 8), ("linear", 8), ("pelican", 8)):
        assert f"{replace_table.difference(record, arm, k)[0]:+.3f}" in readme
    softmax, *others = record["tuned"].values()
    above = [tuned["after"] - softmax["after"] for tuned in others]
    assert len(above) == 4 and all(f" {gap:.3f}" in readme for gap in above)
    [told] = re.findall(r"^```\n(after training.*?)\n```", text, re.DOTALL | re.MULTILINE)
    assert told.splitlines() == printed[-len(told.splitlines()):]
    [softmax] = re.findall(r"layers ([0-9.]+) bits per byte", printed[0])
    assert f"softmax attention is at {softmax} bits per byte" in TEXT


def test_the_speeds_are_those_of_the_record():
    rows = bench_table.read_rows(ROOT / "results/speed")
    lines = [bench_table.machine_of(rows)]
    for (mode, batch), lengths in bench_table.groups_of(rows).items():
        lines += bench_table.table_of(mode, batch, lengths)
    assert len(lines) > 30 and [line for line in lines if line not in TEXT] == []
    [told] = re.findall(r"^\*\*Speed\*\*.*?^$", TEXT, re.DOTALL | re.MULTILINE)
    for mode, length, mixer in (
            ("train", 256, "lln"), ("train", 16384, "lln"), ("train", 256, "gated_deltanet"),
            ("train", 16384, "gated_deltanet"), ("decode", 65536, "lln"),
            ("decode", 65536, "gated_deltanet"), ("decode", 256, "lln"),
            ("decode", 256, "gated_deltanet")):
        of_mixers = bench_table.groups_of(rows)[mode, 1][length]
        ratios = bench_table.ratios_of_rounds(of_mixers[mixer], of_mixers["softmax"])
        assert f" {median(ratios):.2f}" in told, (mode, length, mixer)


def test_the_recipe_has_the_rates_that_were_found(tmp_path):
    found = set()
    for folder in ("shakespeare", "shakespeare_later"):
        for path in (ROOT / "results" / folder).glob("*.jsonl.gz"):
            found |= {(record.config["mixer"], record.config["learning_rate"])
                      for record in read_records(path) if record.config["seed"]}
    rates = dict(found)
    assert len(rates) > 15
    for mixer, rate in rates.items():
        recipe = str(ROOT / "configs/shakespeare.py")
        argv = [recipe, f"--mixer={mixer}", f"--out_dir={tmp_path / mixer}"]
        assert read_options(argv, "tests")[0].learning_rate == rate, mixer


@pytest.mark.parametrize("mixer, rate", [("softmax", 0.008), ("mamba2", 0.004)])
def test_the_losses_late_in_the_context_are_those_of_the_records(mixer, rate):
    records = read_records(ROOT / f"results/shakespeare/{mixer}.jsonl.gz")
    late = [mean(record.scores["by_position"][16:]) for record in records
            if record.scores["by_position"]]
    name = "softmax is" if mixer == "softmax" else f"`{mixer}`"
    assert len(late) == 5 and f"{name} at {mean(late):.3f}" in TEXT


@pytest.mark.parametrize("mixer, form", [("softmax", "with the convolution softmax at {:.3f}"),
                                         ("swa", "a window at {:.3f}, which is less")])
def test_the_losses_late_with_the_convolution_are_those_of_the_records(mixer, form):
    records = read_records(ROOT / f"results/shakespeare_conv/{mixer}.jsonl.gz")
    late = [mean(record.scores["by_position"][16:]) for record in records
            if record.scores["by_position"]]
    assert len(late) == 5 and mean(late) < 1.517
    assert form.format(mean(late)) in " ".join(TEXT.split())


@pytest.mark.parametrize("name, baseline, label", [
    ("shakespeare_strong", "softmax", "causal_max"),
    ("shakespeare_strong", "softmax", "gated_deltanet"), ("shakespeare_strong", "softmax", "lln"),
    ("shakespeare_strong", "softmax", "lln_diag"),
    ("shakespeare_nanogpt", "softmax", "causal_max"), ("shakespeare_nanogpt", "softmax", "pelican"),
    ("shakespeare_nanogpt", "softmax", "lln"), ("shakespeare_nanogpt", "softmax", "ssa"),
    ("shakespeare_nanogpt", "causal_max", "causal_max_context"),
    ("shakespeare_nanogpt", "lln", "linear"), ("shakespeare_nanogpt", "lln", "performer"),
    ("shakespeare_leak", "causal_max", "causal_max_leak")])
def test_the_differences_in_the_text_are_those_of_the_records(name, baseline, label):
    """Each stands there with its interval, that of all comparisons with the baseline; the leak is
    compared with the mixer that has none."""
    losses = {}
    for folder in {name, "shakespeare_nanogpt" if name.endswith("leak") else name}:
        for record in read_records(ROOT / "results" / folder):
            of_mixer = losses.setdefault(record.config["mixer"], {})
            of_mixer[record.config["seed"]] = [record.scores["report"]["loss"]]
    found = judge(losses, baseline)[label]
    words = f"{found.difference:+.3f} [{found.difference_low:+.3f}, {found.difference_high:+.3f}]"
    assert words in TEXT, words


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = copy_repository(tmp_path_factory.mktemp("readme"))
    load_dataset("shakespeare_char", 64)
    for_copy = folder / "data" / "shakespeare_char"
    shutil.copytree(ROOT / "data" / "shakespeare_char", for_copy, dirs_exist_ok=True)
    for name in ("results", "examples", "claims"):
        shutil.copytree(ROOT / name, folder / name)
    (folder / "mine.py").write_text(blocks("python")[0])
    text = "It was a bright cold day in April, and the clocks were striking thirteen.\n"
    (folder / "my.txt").write_text(text * 40)
    return folder


def test_every_command_runs(folder):
    assert run_all(folder, [command for command in commands() if not is_long(command)]) >= 12


@pytest.mark.slow
def test_every_long_command_runs(folder):
    assert run_all(folder, [command for command in commands() if is_long(command)]) >= 8


def run_all(folder, some):
    """Runs commands in `folder`, shortened; returns how many."""
    ran = []
    for command in some:
        if command.startswith("pip install"):
            for name in re.findall(r"-r (\S+)", command):
                assert (ROOT / name).exists()
            continue
        script = next((name for name in SHORTER if name in command), None)
        shorter = SHORTER.get(script, "")
        if "--resume" in command:  # what was shortened to 2 steps goes on for 1 more
            shorter = shorter.replace("=2 ", "=3 ")
        words = shlex.split(re.sub(r"--max_iters=\d+", "", command)) + shorter.split()
        python = [sys.executable]
        if words[0] == "torchrun":
            python += ["-m", "torch.distributed.run"]
        done = subprocess.run([*python, *words[1:]], cwd=folder, capture_output=True, text=True,
                              timeout=300)
        assert done.returncode == 0, (command, done.stdout[-1000:], done.stderr[-2000:])
        ran.append(command)
    return len(ran)


@pytest.mark.slow
def test_from_friday_to_saturday(folder):
    """examples/README.md, with a card in miniature, so that two mixers train 2 steps twice."""
    card = folder / "examples" / "delta_rule.toml"
    text = card.read_text()
    for old, new in (("max_iters = 500", "max_iters = 2\neval_tokens = 3000\nn_layer = 1"),
                     ("looks = [5]", "looks = [2]")):
        assert text.count(old) == 1
        text = text.replace(old, new)
    card.write_text(text.partition("[tune]")[0])
    of_page = blocks("sh", (folder / "examples" / "README.md").read_text())
    # a loop over the tokens takes minutes to audit; tests/test_audit.py does it in part
    some = [line for block in of_page for line in block.splitlines() if "tools.audit" not in line]
    assert run_all(folder, some) == len(some) == 7
    found = json.loads((folder / "results/claims/delta_rule/claim.json").read_text())
    assert found["outcome"] in ("confirmed", "refuted", "undecided")
    assert {path.name for path in (folder / "out/saturday").iterdir()} >= {
        "table.csv", "verdicts.png"}
    assert "Erasing what a key held" in (folder / "out/saturday.html").read_text()


@pytest.mark.parametrize("script, cls", [
    ("train.py", Options), ("bench.py", BenchOptions), ("tools.sweep", SweepOptions)])
def test_the_commands_for_gpus_are_understood(script, cls, monkeypatch):
    """They cannot be run here: their recipes and options are read."""
    monkeypatch.chdir(ROOT)
    lines = [line.partition("  #")[0] for block in blocks("", (ROOT / "docs/gpu.md").read_text())
             for line in block.splitlines() if script in line]
    assert len(lines) >= 1
    for line in lines:
        words = shlex.split(line)
        words = words[1 + next(i for i, word in enumerate(words) if script in word):]
        parse_options(cls, words, "tests", file_class=Options, leave_out=("out_dir", "overwrite"))
