"""tools/sweep_watch.py: what a terminal shows while runs go, and that a log gets none of it."""
import json
import os
import time
from pathlib import Path

import pytest
from conftest import screen_of

import base.terminal
from tools import sweep_runs as runs
from tools import sweep_watch
from tools.sweep_watch import Progress, Watch, in_lines, progress_of

NAMES = ("softmax-lr0.004-seed1", "gated_deltanet-lr0.004-seed1")


@pytest.fixture
def terminal(monkeypatch):
    """terminal(columns, rows): from now on there is one of that size."""
    def set_size(columns, rows=24):
        monkeypatch.setattr(base.terminal, "is_terminal", lambda: True)
        monkeypatch.setenv("TERM", "xterm")
        monkeypatch.setenv("COLUMNS", str(columns))
        monkeypatch.setenv("LINES", str(rows))
    return set_size


def run_in(folder, name):
    return runs.Run(str(folder / name), ("--max_iters=200", "--device=cpu"))


def leave_metrics(run, *rows, more=""):
    folder = Path(run.folder)
    folder.mkdir(exist_ok=True)
    lines = [json.dumps(dict(train_loss=None, val_loss=None) | row) + "\n" for row in rows]
    (folder / "metrics.jsonl").write_text("".join(lines) + more)


def test_progress_is_what_the_last_lines_say(here):
    run = run_in(here, "a")
    assert progress_of(run) == Progress(0, 200, 0.0, None, None)
    rows = [dict(iter=step, seconds=step / 4, train_loss=3 - step / 100) for step in range(1, 100)]
    leave_metrics(run, dict(iter=0, seconds=0, val_loss=4.5), *rows, more='{"iter": 100, "sec')
    assert os.path.getsize(here / "a" / "metrics.jsonl") < sweep_watch.TAIL
    found = progress_of(run)
    assert found == Progress(99, 200, 24.75, 3 - 0.99, 4.5)
    assert found.left() == pytest.approx(101 / 4)
    leave_metrics(run, *rows * 10)  # its beginning is not read
    assert os.path.getsize(here / "a" / "metrics.jsonl") > sweep_watch.TAIL
    assert progress_of(run) == Progress(99, 200, 24.75, 3 - 0.99, None)


@pytest.mark.parametrize("content", [
    b"", b"\n\n", b"[1]\n", b"{}\n", b'"a"\n', b'{"iter": null, "seconds": 1}\n', b"\xff\x00\n",
    b'{"iter": "\x1b[2J", "seconds": 1, "train_loss": 1, "val_loss": 1}\n', b"[" * 9000])
def test_a_file_that_is_none_of_ours_shows_nothing(here, content):
    (here / "a").mkdir()
    (here / "a" / "metrics.jsonl").write_bytes(content)
    assert progress_of(run_in(here, "a")) == Progress(0, 200, 0.0, None, None)


@pytest.mark.parametrize("kind", ["pipe", "link", "folder"])
def test_what_is_no_file_is_neither_waited_for_nor_followed(here, kind):
    (here / "a").mkdir()
    path = here / "a" / "metrics.jsonl"
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    else:
        leave_metrics(run_in(here, "b"), dict(iter=5, seconds=1))
        path.symlink_to(here / "b" / "metrics.jsonl")
    assert progress_of(run_in(here, "a")).step == 0


@pytest.mark.parametrize("columns, shown", [
    (120, [f"{NAMES[0]}         50/200   loss 2.5000  val 2.7500  30 s left",
           f"{NAMES[1]}  200/200  loss 2.4000  val 2.6000  is scored",
           "lln-lr0.004-seed1             starts"]),
    (60, [f"{NAMES[0]}         50/200   30 s left", f"{NAMES[1]}  200/200  is scored",
          "lln-lr0.004-seed1             starts"]),
    (30, [NAMES[0], NAMES[1], "lln-lr0.004-seed1"])])
def test_a_run_has_a_line_that_fits(terminal, columns, shown):
    """The rest of time: 30 + 5 s, 5 s, and a whole run and two that wait, of 60 + 5 s, two at a
    time; SECONDS_AROUND is 5."""
    terminal(columns)
    found = {NAMES[0]: Progress(50, 200, 10.0, 2.5, 2.75),
             NAMES[1]: Progress(200, 200, 80.0, 2.4, 2.6),
             "lln-lr0.004-seed1": Progress(0, 200, 0.0, None, None)}
    *lines, last = in_lines(found, waiting=1, to_come=1, at_once=2)
    assert lines == shown and all(len(line) < columns for line in lines)
    assert last == f"3 running, 2 waiting, about {(35 + 5 + 3 * 65) / 2 / 60:.0f} min left"


def test_of_more_runs_than_lines_the_furthest_are_shown(terminal):
    terminal(80, rows=8)
    found = {f"run{step}": Progress(step, 200, 10.0, 2.5, 2.5) for step in range(1, 20)}
    lines = in_lines(found, 0, 0, 20)
    assert [line.split()[0] for line in lines] == [*(f"run{step}" for step in range(15, 20)), "19"]


def test_lines_are_drawn_in_place_and_give_way_to_what_is_printed(
        here, terminal, monkeypatch, capsys):
    terminal(80)
    monkeypatch.setattr(sweep_watch, "EVERY", 0.0)
    two = [run_in(here, name) for name in NAMES]
    screens = []

    def child(command, env, log):
        [run] = [run for run in two if f"--out_dir={run.folder}" in command]
        if run == two[0]:
            leave_metrics(run, dict(iter=50, seconds=15, train_loss=2.5))
            time.sleep(0.25)
            screens.append(capsys.readouterr().out)
        return 0

    monkeypatch.setattr(runs, "run_child", child)
    monkeypatch.setattr(runs, "remove_all", lambda folders: None)
    for run, error in runs.carry_out(two, watch=Watch(to_come=1)):
        print(f"{Path(run.folder).name}: {error}")
    assert screen_of(screens[0]) == [f"{NAMES[0]}  50/200  loss 2.5000  45 s left",
                                     "1 running, 2 waiting, about 3 min left"]
    after = screen_of(screens[0] + capsys.readouterr().out)
    assert after == [f"{NAMES[0]}: None", f"{NAMES[1]}: None", ""]


def test_ctrl_c_leaves_no_line_of_a_run(here, terminal, monkeypatch, capsys):
    terminal(80)
    monkeypatch.setattr(runs, "train_and_score", lambda *arguments: runs.stopping.wait(10))

    def stop(seconds):
        raise KeyboardInterrupt

    monkeypatch.setattr(runs.time, "sleep", stop)
    try:
        with pytest.raises(KeyboardInterrupt):
            list(runs.carry_out([run_in(here, "a")]))
    finally:
        runs.stopping.clear()
    out = capsys.readouterr().out
    assert "a  starts" in out and "1 running" in out
    [line, rest] = screen_of(out)
    assert "saves a checkpoint" in line and rest == ""


def test_a_log_gets_nothing(here, monkeypatch, capsys):
    monkeypatch.setattr(runs, "run_child", lambda *arguments: 0)
    assert list(runs.carry_out([run := run_in(here, "a")])) == [(run, None)]
    assert capsys.readouterr().out == ""
