"""The Pelican paper's experiment: its recipes, and the command that trains and draws the four
cells."""
import math
import random
from pathlib import Path

import pytest
import torch
from conftest import ROOT, Script, metrics

from base.command_line import parse_options
from config import Options
from tools import pelican_figure
from tools.records import holds_run, read_records, write_records
from tools.score import scores_of
from tools.sweep_runs import Run

# -- the recipes ----------------------------------------------------------------------------------

def test_the_four_cells_differ_in_mixer_temperature_and_ffn_bias_alone():
    cells = {}
    for cell in pelican_figure.CELLS:
        options, *_ = parse_options(Options, [str(pelican_figure.config_file(cell))], "")
        cells[cell] = vars(options)
    expected = {"llama": ("softmax", 1.0, True), "llama_tau01": ("softmax", 0.1, True),
                "pelican": ("pelican", 0.1, False), "pelican_tau1": ("pelican", 1.0, False)}
    for cell, (mixer, tau, ffn_bias) in expected.items():
        own = dict(mixer=mixer, head_temperature=tau, ffn_bias=ffn_bias)
        assert cells[cell] == cells["llama"] | own


def test_the_author_s_rate_after_150_steps(train, here):
    import train as script
    from training.run_folder import read_options
    options, _ = read_options([str(ROOT / "configs/cosmopedia_pelican.py")], "")
    assert script.learning_rate(0, options) == 1e-3
    assert script.learning_rate(150, options) == pytest.approx(0.976e-3)


# -- the command ----------------------------------------------------------------------------------

SMALL = ["--dataset=letters", "--max_iters=2", "--batch_size=2", "--eval_interval=1",
         "--eval_tokens=256"]


@pytest.fixture
def figure(here, monkeypatch, capsys):
    """The command, with train.py's main() in this process and the cells' models smaller."""
    commands, runs_of = [], pelican_figure.runs_of
    smaller = "--n_layer=2", "--n_embd=16", "--ffn_hidden=32"

    def smaller_runs(*arguments):
        runs = runs_of(*arguments)
        return {cell: Run(run.folder, (*run.arguments, *smaller)) for cell, run in runs.items()}
    monkeypatch.setattr(pelican_figure, "runs_of", smaller_runs)

    def carry_out_here(runs):
        for run in runs:
            command = run.command()[1:]
            if holds_run(Path(run.folder)):
                command.append("--resume")
            commands.append(command)
            Script("train", here, monkeypatch, capsys)(*command)
            scores_of(run.folder, torch.device("cpu"))
            yield run, None
    monkeypatch.setattr(pelican_figure, "carry_out", carry_out_here)

    def call(*arguments):
        commands.clear()
        monkeypatch.setattr("sys.argv", ["pelican_figure", *arguments])
        capsys.readouterr()
        pelican_figure.main()
        return capsys.readouterr().out
    call.commands = commands
    return call


def test_four_runs_a_figure_and_a_table(figure, here, capsys):
    out = figure(*SMALL)
    folder = here / "out/pelican/letters"
    assert len(figure.commands) == 4
    assert (folder / "figure3.png").read_bytes().startswith(b"\x89PNG")
    assert (folder / "figure3.md").read_text() in out
    losses = {cell: metrics(folder / cell)[-1]["val_loss"] for cell in pelican_figure.CELLS}
    row = next(line for line in out.splitlines() if "validation, step 2" in line)
    in_row = [text.strip() for text in row.split("|")[2:6]]
    assert in_row == [f"{loss:.3f}" for loss in losses.values()]
    # the head starts at zero: the first loss says nothing of the model
    first = [metrics(folder / cell)[0]["train_loss"] for cell in losses]
    assert first == pytest.approx([math.log(28)] * 4, abs=1e-3)

    # finished runs stay; a figure of fewer steps is of the same runs
    assert (folder / "figure3.md").read_text() in figure(*SMALL) and not figure.commands
    assert "validation, step 1" in figure(*SMALL, "--max_iters=1") and not figure.commands
    (folder / "pelican_tau1/metrics.jsonl").rename(folder / "aside")
    with pytest.raises(SystemExit):
        figure(*SMALL)
    err = capsys.readouterr().err
    assert "metrics.jsonl" in err and err.count("\n") == 1
    (folder / "aside").rename(folder / "pelican_tau1/metrics.jsonl")
    # more steps go on from there
    figure(*SMALL, "--max_iters=3")
    assert len(figure.commands) == 4
    assert all("--resume" in arguments for arguments in figure.commands)
    assert [row["iter"] for row in metrics(folder / "pelican") if row["train_loss"]] == [1, 2, 3]

    # other options are another experiment
    with pytest.raises(SystemExit) as exit:
        figure(*SMALL, "--seed=2")
    assert exit.value.code == 2
    assert "seed 1337, not 2; choose another --out_dir" in capsys.readouterr().err


def test_the_same_figure_from_records(figure, here, capsys):
    """Where a folder holds the records of the runs, nothing is trained anew."""
    figure(*SMALL)
    folder, kept = here / "out/pelican/letters", here / "kept"
    write_records(kept, read_records(folder))
    figure(*SMALL, f"--out_dir={kept}")
    assert not figure.commands
    assert (kept / "figure3.md").read_text() == (folder / "figure3.md").read_text()
    with pytest.raises(SystemExit):
        figure(*SMALL, "--seed=2", f"--out_dir={kept}")
    assert "was run with seed 1337, not 2" in capsys.readouterr().err and not figure.commands


def test_the_figure_of_the_published_records():
    """Those of results/pelican go to the paper's 150 steps, those of the longer run to 1,500."""
    for name, steps in (("pelican", 150), ("pelican_1500", 1500)):
        folder = ROOT / "results" / name
        for cell in pelican_figure.CELLS:
            record = pelican_figure.record_of_cell(folder, cell)
            assert steps in pelican_figure.curves_of(record, steps).validation


@pytest.mark.parametrize("arguments, expected", [
    (["--dataset=nowhere"], "no data set 'nowhere'"), (["--dataset=recall"], "recall task"),
    (["--mixer=lln"], "no option --mixer"),
    (["--max_iters=0"], "--max_iters=0"), (["config.py"], "unexpected argument"),
])
def test_bad_input_gets_one_line(arguments, expected, figure, here, capsys):
    with pytest.raises(SystemExit) as exit:
        figure(*arguments)
    line = capsys.readouterr().err
    assert exit.value.code == 2 and expected in line and line.count("\n") == 1
    assert not list(here.iterdir())


def test_shares_of_the_lead():
    losses = {"llama": 7.0, "llama_tau01": 6.25, "pelican_tau1": 6.8, "pelican": 6.0}
    found = pelican_figure.shares(losses)
    assert [found.lead, found.llama, found.pelican] == pytest.approx([1.0, 0.75, 0.8])
    found = pelican_figure.shares(losses | {"pelican": 7.5})
    assert (found.lead, found.llama, found.pelican) == (-0.5, None, None)


def test_smoothing_is_a_mean_of_the_last_steps():
    values = [random.Random(0).random() for _ in range(25)]
    smoothed = pelican_figure.smooth(dict(enumerate(values, 1)))
    expected = [values[0], sum(values[:4]) / 4, sum(values[15:]) / 10]
    assert [smoothed[1], smoothed[4], smoothed[25]] == pytest.approx(expected)
