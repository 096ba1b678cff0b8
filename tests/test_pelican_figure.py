"""The Pelican paper's experiment: its recipes, what counting reaches, and the command that trains and draws the four cells."""
import math
import random

import numpy as np
import pytest
import torch
from conftest import ROOT, Script, metrics

from base.command_line import parse_options
from config import Options
from tools import pelican_figure
from tools.ngrams import Counts, D, K, counted_losses
from tools.score import scores_of
from tools.sweep_runs import Run
from training.run_folder import holds_run

# -- counting ---------------------------------------------------------------------------------------------------------

def slow_losses(train, tokens, V, d, k):
    """The formulas of tools/ngrams.py as they stand there, one token after the other."""
    train, tokens = list(map(int, train)), list(map(int, tokens))
    unigram = bigram = 0.0
    for a, b in zip(tokens, tokens[1:]):
        p = (train.count(b) + d) / (len(train) + d * V)
        pairs = list(zip(train, train[1:]))
        unigram -= math.log(p)
        bigram -= math.log((pairs.count((a, b)) + k * p) / (sum(pair[0] == a for pair in pairs) + k))
    return unigram / (len(tokens) - 1), bigram / (len(tokens) - 1)


def test_counting_is_that_of_the_slow_formulas():
    rng = np.random.default_rng(0)
    tokens = rng.zipf(1.6, size=600).clip(max=23).astype(np.uint16) - 1  # one of 24 symbols never occurs, some only in the end
    train, val, V = tokens[:400], tokens[400:], 24
    unigram, d, bigram, k = counted_losses(train, val, V)
    assert (unigram, bigram) == pytest.approx(slow_losses(train, val, V, d, k), rel=1e-12)
    # d and k are the best of the grid on the last tenth of train
    of = lambda d, k: slow_losses(train[:360], train[360:], V, d, k)
    assert d == min(D, key=lambda d: of(d, 1)[0]) and k == min(K, key=lambda k: of(d, k)[1])


def test_counting_in_closed_form():
    chain = np.array([0, 1] * 500 + [0], dtype=np.uint16)  # each symbol says the next
    unigram, _, bigram, _ = counted_losses(chain, chain, 2)
    assert unigram == pytest.approx(math.log(2), abs=1e-5) and bigram < 1e-3
    even = np.random.default_rng(1).integers(8, size=40000)  # no symbol says anything
    unigram, _, bigram, k = counted_losses(even[:30000], even[30000:], 8)
    assert unigram == pytest.approx(math.log(8), abs=2e-3) and bigram == pytest.approx(math.log(8), abs=4e-3) and k >= 512


def test_probabilities_sum_to_one_over_a_large_vocabulary():
    V = 50257
    counts = Counts(np.array([1, 50256, 1, 3, 50256, 0, 1]), V)
    b = np.arange(V)
    for a in (0, 1, 2, 50256):  # 2 never occurs
        p = (counts.pair(np.full(V, a), b) + 4 * counts.unigram(b, 0.5)) / (counts.first[a] + 4)
        assert p.sum() == pytest.approx(1, abs=1e-9)


def test_tiny_shakespeare_has_the_known_losses(shakespeare_char):
    from data import load_dataset
    data = load_dataset("shakespeare_char", 64)
    unigram, _, bigram, _ = counted_losses(data.train, data.val, data.vocab_size)
    assert unigram == pytest.approx(3.347, abs=0.001) and bigram == pytest.approx(2.482, abs=0.005)


# -- the recipes ------------------------------------------------------------------------------------------------------

def test_the_four_cells_differ_in_mixer_temperature_and_ffn_bias_alone():
    cells = {cell: vars(parse_options(Options, [str(ROOT / f"configs/cosmopedia_{cell}.py")], "")[0]) for cell in pelican_figure.CELLS}
    expected = {"llama": ("softmax", 1.0, True), "llama_tau01": ("softmax", 0.1, True),
                "pelican": ("pelican", 0.1, False), "pelican_tau1": ("pelican", 1.0, False)}
    for cell, (mixer, tau, ffn_bias) in expected.items():
        assert cells[cell] == cells["llama"] | dict(mixer=mixer, head_temperature=tau, ffn_bias=ffn_bias)


def test_the_author_s_rate_after_150_steps(train, here):
    import train as script
    from training.run_folder import read_options
    options, _ = read_options([str(ROOT / "configs/cosmopedia_pelican.py")], "")
    assert script.learning_rate(0, options) == 1e-3 and script.learning_rate(150, options) == pytest.approx(0.976e-3)


# -- the command ------------------------------------------------------------------------------------------------------

SMALL = ["--dataset=letters", "--max_iters=2", "--batch_size=2", "--eval_interval=1", "--eval_tokens=256"]


@pytest.fixture
def figure(here, monkeypatch, capsys):
    """The command, with train.py's main() in this process and the cells' models smaller."""
    commands, runs_of = [], pelican_figure.runs_of
    smaller = "--n_layer=2", "--n_embd=16", "--ffn_hidden=32"
    monkeypatch.setattr(pelican_figure, "runs_of", lambda *arguments: {
        cell: Run(run.folder, (*run.arguments, *smaller)) for cell, run in runs_of(*arguments).items()})

    def carry_out_here(runs):
        for run in list(runs):
            if not run.finished():
                commands.append(run.command()[1:] + (["--resume"] if holds_run(run.folder) else []))
                Script("train", here, monkeypatch, capsys)(*commands[-1])
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
    assert (folder / "figure3.png").read_bytes().startswith(b"\x89PNG") and (folder / "figure3.md").read_text() in out
    losses = {cell: metrics(folder / cell)[-1]["val_loss"] for cell in pelican_figure.CELLS}
    row = next(line for line in out.splitlines() if "validation, step 2" in line)
    assert [f"{losses[cell]:.3f}" for cell in pelican_figure.CELLS] == [cell.strip() for cell in row.split("|")[2:6]]
    # the head starts at zero: the first loss says nothing of the model
    assert [metrics(folder / cell)[0]["train_loss"] for cell in losses] == pytest.approx([math.log(28)] * 4, abs=1e-3)

    # finished runs stay; a figure of fewer steps is of the same runs
    assert (folder / "figure3.md").read_text() in figure(*SMALL) and not figure.commands
    assert "validation, step 1" in figure(*SMALL, "--max_iters=1") and not figure.commands
    (folder / "pelican_tau1/metrics.jsonl").rename(folder / "aside")
    with pytest.raises(SystemExit):
        figure(*SMALL)
    assert "metrics.jsonl is damaged" in capsys.readouterr().err
    (folder / "aside").rename(folder / "pelican_tau1/metrics.jsonl")
    # more steps go on from there
    figure(*SMALL, "--max_iters=3")
    assert all("--resume" in arguments for arguments in figure.commands) and len(figure.commands) == 4
    assert [row["iter"] for row in metrics(folder / "pelican") if row["train_loss"]] == [1, 2, 3]

    # other options are another experiment
    with pytest.raises(SystemExit) as exit:
        figure(*SMALL, "--seed=2")
    assert exit.value.code == 2 and "seed 1337, not 2; choose another --out_dir" in capsys.readouterr().err


@pytest.mark.parametrize("arguments, expected", [
    (["--dataset=nowhere"], "no data set 'nowhere'"), (["--dataset=recall"], "recall task"), (["--mixer=lln"], "no option --mixer"),
    (["--max_iters=0"], "--max_iters=0"), (["config.py"], "unexpected argument"),
])
def test_bad_input_gets_one_line(arguments, expected, figure, here, capsys):
    with pytest.raises(SystemExit) as exit:
        figure(*arguments)
    line = capsys.readouterr().err
    assert exit.value.code == 2 and expected in line and line.count("\n") == 1 and not list(here.iterdir())


def test_shares_of_the_lead():
    losses = {"llama": 7.0, "llama_tau01": 6.25, "pelican_tau1": 6.8, "pelican": 6.0}
    assert pelican_figure.shares(losses) == (1.0, 0.75, pytest.approx(0.8))
    assert pelican_figure.shares(losses | {"pelican": 7.5}) == (-0.5, None, None)


def test_smoothing_is_a_mean_of_the_last_steps():
    values = [random.Random(0).random() for _ in range(25)]
    smoothed = pelican_figure.smooth(dict(enumerate(values, 1)))
    assert [smoothed[1], smoothed[4], smoothed[25]] == pytest.approx([values[0], sum(values[:4]) / 4, sum(values[15:]) / 10])
