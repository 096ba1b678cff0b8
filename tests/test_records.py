"""tools/records.py: records give back what went in, and whatever stands in one is read, or is one
line with status 2."""
import gzip
import json
import os
import re
import sys
from dataclasses import asdict
from pathlib import Path

import pytest
from conftest import ROOT

from base.errors import BadInput
from config import Options
from model import model_config
from tools import compare, records

CONFIG = asdict(Options(n_layer=1, n_head=2, n_embd=8, block_size=4, max_iters=2, mixer="softmax",
                        dtype="float32", learning_rate=0.01, lr_decay_iters=2, min_lr=0.001,
                        dataset="letters"))
CONFIG |= asdict(model_config(CONFIG | {"vocab_size": 1}, "test"))
CONFIG["vocab_size"] = 9
METRICS = [
    {"iter": 1, "train_loss": 2.0, "val_loss": None, "tokens_per_s": 9.0, "peak_bytes": None,
     "flops": 1e3, "seconds": 0.5},
    {"iter": 2, "train_loss": None, "val_loss": 1.5, "tokens_per_s": None, "peak_bytes": 2**20,
     "flops": 2e3, "seconds": 1.0},
]
PART = {"loss": 1.4, "bpb": 2.0, "accuracy": None}
SCORES = {"weights": "0", "vocab_size": 9, "iter": 2, "select": PART, "report": PART,
          "by_position": [1.9, 1.8, 1.7, 1.6], "by_cell": None, "first_losses": [2.2, 2.1],
          "diverged": False}

# JSON, and what is none, as texts that stand in the place of a value
HOSTILE = ["null", "true", '"text"', '"\\ud800"', '"\\u001b[31m\\n"', "[]", "[1, null]", "{}",
           '{"loss": {}}', "-1", "0", "3.5", "1e308", "1e999", "9" * 400, "9" * 5000, "NaN",
           "-Infinity", "2147483647", "[" * 1000 + "]" * 1000, "{", ""]


def record(seed, mixer="softmax"):
    config = CONFIG | {"seed": seed, "mixer": mixer}
    scores = json.loads(json.dumps(SCORES))
    scores["report"]["loss"] += seed / 100
    name = f"{mixer}-lr0.01-seed{seed}"
    return records.Record(name, Path("unused"), config, METRICS, scores)


def as_folder(folder, record):
    """A record as a run's folder."""
    run = folder / record.name
    run.mkdir(parents=True)
    (run / "config.json").write_text(json.dumps(record.config))
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in record.metrics))
    (run / "scores.json").write_text(json.dumps(record.scores))
    return run


def contents(found):
    return [(r.name, r.config, r.metrics, r.scores) for r in found]


# -- what is written and read ---------------------------------------------------------------------

def test_records_give_back_what_went_in(tmp_path):
    """Also in a second file, of runs that come later; seeds are in the order of their numbers."""
    some = [record(seed) for seed in (10, 2)] + [record(1, "pelican")]
    paths = records.write_records(tmp_path, some)
    assert sorted(path.name for path in paths) == [
        "pelican.jsonl.gz", "softmax.jsonl.gz"]
    expected = [some[2], some[1], some[0]]
    assert contents(records.read_records(tmp_path)) == contents(expected)
    records.write_records(tmp_path, [record(3)])
    seeds = [r.config["seed"] for r in records.read_file(tmp_path / "softmax.jsonl.gz")]
    assert seeds == [2, 3, 10]
    run = as_folder(tmp_path / "runs", record(2))
    assert contents(records.read_records(run)) == contents([record(2)])
    found = records.find_record(tmp_path, "softmax-lr0.01-seed10")
    assert contents([found]) == contents([some[0]]) and found.reached(2) and not found.reached(3)
    assert records.find_record(tmp_path, "lln-lr0.01-seed1") is None


def test_equal_records_are_equal_bytes(tmp_path):
    [one] = records.write_records(tmp_path / "a", [record(1), record(2)])
    os.utime(one, (0, 0))
    [other] = records.write_records(tmp_path / "b", [record(2), record(1)])
    records.write_records(tmp_path / "b", records.read_records(one))
    assert one.read_bytes() == other.read_bytes()
    assert one.read_bytes()[4:8] == bytes(4)  # the time stamp


def test_a_record_of_another_run_stays(tmp_path):
    [path] = records.write_records(tmp_path, [record(1)])
    before = path.read_bytes()
    other = record(1)
    other.config = other.config | {"n_embd": 16}
    with pytest.raises(BadInput, match="of another run"):
        records.write_records(tmp_path, [record(2, "pelican"), other])
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]


def test_every_record_of_the_repository_is_whole():
    """And is what would be written: nothing was lost or changed by hand."""
    paths = sorted((ROOT / "results").glob("*/*"))
    assert len(paths) >= 102
    for path in paths:
        if path.name.endswith(records.SUFFIX):
            found = records.read_file(path)
            assert all(r.reached(r.config["max_iters"]) for r in found), path
            assert {records.arm_of(r.name) + records.SUFFIX for r in found} == {path.name}


def test_a_run_of_a_sweep_is_found_among_its_records(tmp_path, monkeypatch):
    """A folder goes before the files beside it, these before those of results/."""
    monkeypatch.setattr(records, "RESULTS", tmp_path / "results")
    records.write_records(tmp_path / "results/mine", [record(1)])
    sweep = tmp_path / "out/mine"
    sweep.mkdir(parents=True)
    (sweep / "sweep.json").write_text('{"runs": ["softmax-lr0.01-seed1"], "failed": {}}')
    assert contents(records.read_records(sweep)) == contents([record(1)])
    other = record(1)
    other.scores["report"]["loss"] = 9.0
    records.write_records(sweep, [other])
    assert contents(records.read_records(sweep)) == contents([other])
    as_folder(sweep, record(1))
    assert contents(records.read_records(sweep)) == contents([record(1)])


def test_what_chose_the_rates_is_kept_and_not_compared(compared, tmp_path):
    """--keep takes along all that was scored in a sweep's folder, and its sweep.json."""
    sweep = tmp_path / "sweep"
    for seed in (0, 1, 2):
        as_folder(sweep, record(seed))
    (sweep / "failed").mkdir()
    (sweep / "failed/config.json").write_text("{}")
    names = [record(seed).name for seed in (1, 2)]
    (sweep / "sweep.json").write_text(json.dumps({"runs": names, "failed": {}, "chosen": {"a": 1}}))
    kept = tmp_path / "kept"
    status, out, _ = compared(sweep, f"--keep={kept}")
    assert status == 0
    found = records.read_file(kept / "softmax.jsonl.gz")
    assert [r.config["seed"] for r in found] == [0, 1, 2]
    assert json.loads((kept / "sweep.json").read_text())["chosen"] == {"a": 1}
    assert compared(kept)[1].splitlines()[:3] == out.splitlines()[:3]


# -- hostile files --------------------------------------------------------------------------------

def refused(path, words):
    with pytest.raises(BadInput, match=words):
        records.read_records(path)


def test_a_file_that_is_no_record_or_too_large_is_refused(tmp_path, monkeypatch):
    path = tmp_path / "a.jsonl.gz"
    [good] = records.write_records(tmp_path / "good", [record(1)])
    good = good.read_bytes()
    for content in (b"", b"text", good[:-1], good[:40], good[:30] + b"xx" + good[32:]):
        path.write_bytes(content)
        if content:
            refused(path, "is damaged")
        else:
            assert records.read_records(path) == []
    path.write_bytes(gzip.compress(bytes(records.UNPACKED_BYTES + 1)))
    assert path.stat().st_size < 2**20
    refused(path, "unpacks to more than")
    monkeypatch.setattr(records, "PACKED_BYTES", 100)
    refused(path, "at most 100 are read")
    path.unlink()
    os.mkfifo(path)
    refused(path, "no regular file")


@pytest.mark.parametrize("lines", [
    ["metrics"], ["scores"], ["config", "config"], ["config", "scores", "scores"],
    ["config", "scores", "metrics"], ["config", "other"]])
def test_lines_in_another_order_are_refused(tmp_path, lines):
    values = {"config": CONFIG, "metrics": METRICS[0], "scores": SCORES}
    text = ""
    for kind in lines:
        text += json.dumps({"kind": kind, "run": "a", "value": values.get(kind)}) + "\n"
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(text.encode()))
    refused(tmp_path / "a.jsonl.gz", f"line {len(lines)}")


@pytest.fixture
def compared(tmp_path, monkeypatch, capsys):
    """compared(*arguments): (status, stdout, stderr) of tools.compare in this process, which draws
    nothing."""
    monkeypatch.setattr(compare.plots, "draw", lambda *arguments: [])

    def call(*arguments):
        words = ["compare", *map(str, arguments), f"--out_dir={tmp_path}/out", "--device=cpu"]
        monkeypatch.setattr(sys, "argv", words)
        status = 0
        try:
            compare.main()
        except SystemExit as exit:
            status = exit.code
        return status, *capsys.readouterr()
    return call


def places(value, above=()):
    """The path of every value within a JSON value, from the outermost in."""
    yield above
    if isinstance(value, dict):
        for name in value:
            yield from places(value[name], (*above, name))
    elif isinstance(value, list):
        for i in range(min(len(value), 2)):
            yield from places(value[i], (*above, i))


def with_text_at(value, place, text):
    """JSON of a value, with a raw text in one place."""
    mark = "in this place"
    if not place:
        return text
    changed = json.loads(json.dumps(value))
    inner = changed
    for key in place[:-1]:
        inner = inner[key]
    inner[place[-1]] = mark
    return json.dumps(changed).replace(json.dumps(mark), text)


def assert_in_order(place, text, status, out, err):
    """Read, or refused in one line; nothing that a terminal would obey."""
    case = place, text[:30], out[-300:], err[-300:]
    assert status in (0, 2), case
    if status == 2:
        assert err.count("\n") == 1 and err.startswith("tools.compare: "), case
        assert len(err) < 2000, case
    else:
        assert "Traceback" not in err, case
    assert "\x1b" not in out + err, case


# of the config those that comparing looks at, and one each that it does not
OPTIONS = ["mixer", "seed", "max_iters", "learning_rate", "dtype", "dataset", "block_size",
           "eval_tokens", "n_layer", "n_embd", "n_head", "n_kv_head", "ffn_hidden", "allow_leak",
           "bias", "pos", "rope_base", "head_temperature", "linformer_segment", "out_dir",
           "mixer_file", "batch_size", "vocab_size", "weight_decay"]


@pytest.mark.parametrize("file", ["config.json", "metrics.jsonl", "scores.json", "sweep.json"])
def test_any_value_in_any_place_is_read_or_refused_in_one_line(compared, tmp_path, file):
    """Of a run among others, in a folder; the same content in a file of records is read alike."""
    sweep = {"runs": [record(seed).name for seed in (1, 2)], "missing": ["a"],
             "failed": {"b": "error"}, "chosen": {"softmax": 0.01}}
    folder = tmp_path / "sweep"
    runs = [as_folder(folder, record(seed)) for seed in (1, 2)]
    (folder / "sweep.json").write_text(json.dumps(sweep))
    assert compared(folder)[0] == 0
    values = {"config.json": CONFIG | {"seed": 1}, "scores.json": SCORES, "sweep.json": sweep,
              "metrics.jsonl": METRICS[1]}
    path = (folder if file == "sweep.json" else runs[0]) / file
    before = path.read_text()
    refusals = 0
    for place in places(values[file]):
        if file == "config.json" and place and place[0] not in OPTIONS:
            continue
        for text in HOSTILE:
            content = with_text_at(values[file], place, text)
            if file == "metrics.jsonl":
                content = json.dumps(METRICS[0]) + "\n" + content + "\n"
            path.write_text(content)
            status, out, err = compared(folder)
            assert_in_order(place, text, status, out, err)
            refusals += status == 2
    path.write_text(before)
    assert refusals > 50 and compared(folder)[0] == 0


def test_any_value_in_any_place_of_a_file_of_records(tmp_path):
    path = tmp_path / "a.jsonl.gz"
    lines = [{"kind": "config", "run": "a-seed1", "value": CONFIG | {"seed": 1}},
             {"kind": "metrics", "run": "a-seed1", "value": METRICS[1]},
             {"kind": "scores", "run": "a-seed1", "value": SCORES}]
    read = refused = 0
    for number, line in enumerate(lines):
        for place in places(line):
            for text in HOSTILE:
                texts = [json.dumps(line) for line in lines]
                texts[number] = with_text_at(line, place, text)
                path.write_bytes(gzip.compress("".join(f"{t}\n" for t in texts).encode(), 1))
                try:
                    records.read_records(path)
                    read += 1
                except BadInput:
                    refused += 1
    assert read > 100 and refused > 500


def test_names_from_files_are_shown_and_not_obeyed(compared, tmp_path):
    """A mixer whose name a terminal would obey, in table, notes and csv."""
    from mixers import MIXERS
    name = 'evil\x1b[31m $\\frac$ "a"'
    MIXERS[name] = MIXERS["softmax"]
    try:
        for seed in (1, 2):
            as_folder(tmp_path / "runs", record(seed))
            evil = record(seed, name)
            evil.name = f"evil-seed{seed}"
            evil.config["beta1\x1b"] = "\x1b"
            as_folder(tmp_path / "runs", evil)
        status, out, err = compared(tmp_path / "runs")
    finally:
        del MIXERS[name]
    assert (status, err) == (0, "") and "evil\\x1b[31m" in out and "\x1b" not in out
    assert "\x1b" not in (tmp_path / "out/table.md").read_text()
    assert 'evil\x1b[31m $\\frac$ ""a""' in (tmp_path / "out/table.csv").read_text()


# -- the terminal ---------------------------------------------------------------------------------

@pytest.mark.parametrize("width", [80, 120, 200, 500])
def test_a_terminal_gets_as_many_columns_as_fit(width, monkeypatch):
    """The four that matter most always; names are cut off where they must be."""
    long = "softmax,linear,linear,linear"
    arms = compare.arms_of([record(seed, mixer) for mixer in ("softmax", long) for seed in (1, 2)])
    verdicts = compare.judge_arms(arms, "softmax")
    verdicts[arms[1].label].word = "better"
    lines = [compare.line_of(arm, verdicts[arm.label]) for arm in arms]
    shown = compare.table_for_terminal(lines, width).split("\n")
    assert all(len(row) <= width for row in shown) and len(shown) == 3
    head = shown[0]
    for name in ("mixer", "loss", "minus baseline", "verdict"):
        assert name in head
    assert ("seeds" in head, "tokens/s" in head) == (width >= 120, width >= 200)
    if width == 500:
        names = re.split("  +", head)
        whole = compare.table(lines).split("\n")[0]
        assert names == [cell.strip() for cell in whole.split("|")[1:-1]]
    assert "\x1b" not in "".join(shown)
    monkeypatch.setattr("sys.stdout.isatty", lambda: True, raising=False)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("NO_COLOR", raising=False)
    assert "\x1b[32m" in compare.table_for_terminal(lines, width)
    monkeypatch.setenv("NO_COLOR", "1")
    assert compare.table_for_terminal(lines, width).split("\n") == shown
