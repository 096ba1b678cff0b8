"""Every command of the README and of docs/runs.md runs, shortened, in order, in a copy of the repository."""
import re
import shlex
import shutil
import subprocess
import sys

import pytest
import torch
from conftest import ROOT, copy_repository

from data import load_dataset
from mixers import MIXERS
from tools import compare

SHORTER = {"train.py": "--max_iters=2 --eval_tokens=3000", "sample.py": "--num_samples=1 --max_new_tokens=20",
           "tools.inspect_attention": "--length=16", "--mixers=causal_max_leak": "--max_iters=2 --eval_tokens=3000 --seeds=1",
           "configs/mqar.py --mixers": "--max_iters=2 --eval_tokens=3000 --seeds=1 --mixers=softmax,linformer",
           "tools.sweep": "--max_iters=2 --eval_tokens=3000 --seeds=1 --mixers=softmax,pelican --learning_rates=1e-3",
           "tools.pelican_figure": "--dataset=shakespeare_char --max_iters=1 --batch_size=1 --eval_tokens=1000",
           "bench.py": "--lengths=16,32 --mode=prefill --rounds=1 --seconds=0.01"}
LONG = ("tools.pelican_figure", "leak", "_1 ", "configs/shakespeare_long.py", "configs/mqar.py --mixers")  # several trainings or evaluations, however short
TEXT = "\n".join((ROOT / name).read_text() for name in ("README.md", "docs/runs.md"))


def blocks(language):
    return re.findall(rf"^```{language}\n(.*?)^```$", TEXT, re.DOTALL | re.MULTILINE)


def commands():
    return [command.strip() for block in blocks("sh") for line in block.splitlines() for command in line.split("&&")]


def test_the_two_commands_for_newcomers_are_there():
    assert "pip install -r requirements.txt && python train.py configs/shakespeare_pelican.py" in TEXT
    assert "pip install -r requirements.txt -r requirements-dev.txt && python -m pytest" in TEXT


def test_every_mixer_and_every_file_named_is_there():
    assert not [name for name in re.findall(r"(?:configs|mixers|tools|examples|docs)/\w+\.\w+", TEXT) if not (ROOT / name).exists()]
    table = re.findall(r"^\| (`.*?`) \|", TEXT, re.MULTILINE)
    listed = {name for row in table for name in re.findall(r"`(\w+)`", row)} - {"mixer"}
    assert listed == set(MIXERS)


def tables(first_cell):
    """The tables of the README whose header begins with first_cell: each a list of {column: cell}."""
    for header, body in re.findall(rf"^\| ({first_cell} \|.*) \|\n\|[-|: ]+\|\n((?:\|.*\n)+)", TEXT, re.MULTILINE):
        names = [name.strip() for name in header.split("|")]
        yield [dict(zip(names, (cell.strip() for cell in line.strip("|").split("|")))) for line in body.splitlines()]


def records(name):
    return [compare.Record(folder, torch.device("cpu")) for folder in compare.run_folders([ROOT / "results" / name])]


@pytest.mark.parametrize("first_cell, name", [("mixer", "shakespeare"), ("longer recipe", "shakespeare_long")])
def test_the_results_are_those_of_the_records(first_cell, name):
    groups, _ = compare.grouped(records(name))
    tests = compare.verdicts({label: [record.scores["report"]["loss"] for record in group] for label, group in groups.items()}, "softmax")
    lines = {label: compare.figures(label, group) | tests[label] for label, group in groups.items()}
    [rows] = tables(first_cell)
    assert {row[first_cell] for row in rows} == set(lines) and (name != "shakespeare" or set(lines) == set(MIXERS))
    for row in rows:
        label = row.pop(first_cell)
        assert row == {column: compare.COLUMNS[column](lines[label]) for column in row}


def test_the_recall_table_is_that_of_the_records():
    [rows] = tables("recall")
    for task in set(rows[0]) - {"recall"}:
        groups, _ = compare.grouped(records(task))
        shown = {row["recall"]: row[task] for row in rows}
        for label, group in groups.items():
            values = sorted(record.scores["report"]["accuracy"] for record in group)
            assert len(values) == 3 and shown[label] == f"{sum(values) / 3:.2f} ({values[0]:.2f} to {values[-1]:.2f})", (task, label)
        assert groups.keys() == shown.keys() == set(MIXERS)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = copy_repository(tmp_path_factory.mktemp("readme"))
    load_dataset("shakespeare_char", 64)
    shutil.copytree(ROOT / "data" / "shakespeare_char", folder / "data" / "shakespeare_char", dirs_exist_ok=True)
    for name in ("results", "examples"):
        shutil.copytree(ROOT / name, folder / name)
    (folder / "mine.py").write_text(blocks("python")[0])
    (folder / "my.txt").write_text("It was a bright cold day in April, and the clocks were striking thirteen.\n" * 40)
    return folder


def test_every_command_runs(folder):
    assert run_all(folder, [command for command in commands() if not any(word in f"{command} " for word in LONG)]) >= 12


@pytest.mark.slow
def test_every_long_command_runs(folder):
    assert run_all(folder, [command for command in commands() if any(word in f"{command} " for word in LONG)]) >= 8


def run_all(folder, some):
    """Runs commands in `folder`, shortened; returns how many."""
    ran = []
    for command in some:
        if command.startswith("pip install"):
            assert all((ROOT / name).exists() for name in re.findall(r"-r (\S+)", command))
            continue
        script = next((name for name in SHORTER if name in command), None)
        # what was shortened to 2 steps goes on for 1 more
        shorter = SHORTER.get(script, "").replace("=2 ", "=3 ") if "--resume" in command else SHORTER.get(script, "")
        words = shlex.split(re.sub(r"--max_iters=\d+", "", command)) + shorter.split()
        python = {"python": [sys.executable], "torchrun": [sys.executable, "-m", "torch.distributed.run"]}[words[0]]
        done = subprocess.run([*python, *words[1:]], cwd=folder, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, (command, done.stdout[-1000:], done.stderr[-2000:])
        ran.append(command)
    return len(ran)
