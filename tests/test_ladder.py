"""tools.ladder: the compute that a baseline needs for an arm's loss, over two sizes."""
import math
import sys

import pytest
from test_compare import made_up, tuning

from base.errors import BadInput
from tools import drawing, ladder, ladder_plot, records
from tools.sweep_tuning import LATER_SEEDS

SMALL, LARGE = (1e12, 2.0), (16e12, 1.6)  # FLOPs and loss of the baseline


@pytest.mark.parametrize("loss, compute, expected", [
    (2.0, 1e12, (1.0, "")), (1.6, 16e12, (1.0, "")),
    (1.8, 4e12, (1.0, "")),    # half way in the logarithm
    (1.8, 2e12, (2.0, "")), (1.9, 1e12, (2.0, "")),
    (2.1, 1e12, (1.0, "<")),   # more than what the baseline needs for less
    (1.5, 8e12, (2.0, ">"))])  # it has not got there
def test_the_multiplier(loss, compute, expected):
    value, sign = ladder.multiplier(loss, compute, [SMALL, LARGE])
    assert (pytest.approx(value), sign) == expected


def write(folder, losses, flops, seconds, n_embd, **options):
    """Runs of three seeds for each arm, {mixer: loss}; seed by seed the same difference."""
    some = []
    for mixer, loss in losses.items():
        for seed in (1, 2, 3):
            blocks = [loss + seed / 1000 + (block == seed) / 5000 for block in range(6)]
            record = made_up(mixer, seed, blocks, n_embd=n_embd, **options)
            record.metrics = [row | {"flops": flops[mixer], "seconds": seconds}
                              for row in record.metrics]
            some.append(record)
    records.write_records(folder, some)
    return str(folder)


def printed(capsys, monkeypatch, *names):
    monkeypatch.setattr(sys, "argv", ["ladder", *names, "--device=cpu"])
    ladder.main.__wrapped__()
    rows = [line.strip("| ").split(" | ") for line in capsys.readouterr().out.splitlines()]
    return {(row[0], row[1]): row for row in rows if len(row) == 8}, rows


@pytest.fixture
def sizes(tmp_path):
    small = write(tmp_path / "small", {"softmax": 2.0, "lln": 1.9, "pelican": 2.3},
                  {"softmax": 1e15, "lln": 1e15, "pelican": 5e14}, 10.0, 8)
    large = write(tmp_path / "large", {"softmax": 1.6, "lln": 1.7},
                  {"softmax": 16e15, "lln": 4e15}, 40.0, 16)
    return small, large


def test_the_table(sizes, capsys, monkeypatch):
    table, rows = printed(capsys, monkeypatch, *reversed(sizes))  # the order of names is no matter
    [small, large] = sorted({size for size, arm in table if arm == "softmax"},
                            key=lambda size: int(size.replace(",", "")))
    assert table[small, "softmax"][4:6] == ["1.000", "1.00"]
    assert table[small, "lln"][5].startswith("2.00 [")
    # 1.7 is three quarters of the way from 1e15 to 16e15: 8e15, for which lln took 4e15
    assert table[large, "lln"][5].startswith("2.00 [")
    [pelican] = [row for (_, arm), row in table.items() if arm == "pelican"]
    assert pelican[5] == "<2.00 [<2.00, <2.00]"
    assert table[small, "lln"][7].startswith(f"{4**0.25:.2f} [")  # seconds: 10 to 40
    low, high = table[small, "lln"][5].removeprefix("2.00 [").removesuffix("]").split(", ")
    assert float(low) <= 2 <= float(high)
    assert [row[0] for row in rows[-2:]] == [
        f"by loss at {small} parameters: lln, softmax, pelican",
        f"by loss at {large} parameters: softmax, lln"]


def test_parameters_are_without_vocabulary_and_positions(sizes):
    [record] = [record for record in records.read_records(sizes[0])
                if record.config["mixer"] == "pelican" and record.config["seed"] == 1]
    more = {**record.config, "block_size": 2 * record.config["block_size"]}
    same = records.Record(record.name, record.source, more, [], record.scores | {"vocab_size": 99})
    assert ladder.parameters_of(record) == ladder.parameters_of(same) > 0


def test_a_baseline_that_does_not_gain_by_its_size_says_nothing(tmp_path, capsys, monkeypatch):
    flops = {"softmax": 1e15, "lln": 1e15}
    small = write(tmp_path / "a", {"softmax": 2.0, "lln": 1.9}, flops, 1, 8)
    more = {"softmax": 9e15, "lln": 9e15}
    large = write(tmp_path / "b", {"softmax": 2.1, "lln": 1.7}, more, 2, 16)
    table, _ = printed(capsys, monkeypatch, small, large)
    assert {row[5] for key, row in table.items() if key[1] != "arm" and key[1] != "---"} == {"n/a"}


def test_the_picture_has_a_panel_for_each_size(sizes, tmp_path, capsys, monkeypatch):
    drawn = []

    def keep(path, figure):
        drawn.append(figure)
        return drawing.save(path, figure)
    monkeypatch.setattr(ladder, "save", keep)
    printed(capsys, monkeypatch, *sizes, f"--picture={tmp_path / 'ladder.png'}")
    assert (tmp_path / "ladder.png").read_bytes().startswith(b"\x89PNG")
    [figure] = drawn
    small, large = figure.axes
    assert [label.get_text() for label in small.get_yticklabels()] == ["lln", "pelican"]
    points = [[float(line.get_xdata()[0]) for line in ax.lines if line.get_marker() == "o"]
              for ax in (small, large)]
    assert points == [pytest.approx([-0.1, 0.3]), pytest.approx([0.1])]
    assert [text.get_text() for text in small.texts] == ["better", "worse"]
    with pytest.raises(BadInput, match="--picture=.*jpg: string should match"):
        printed(capsys, monkeypatch, *sizes, f"--picture={tmp_path / 'ladder.jpg'}")


def test_a_picture_of_baselines_alone_is_refused(tmp_path, capsys, monkeypatch):
    alone = [write(tmp_path / name, {"softmax": loss}, {"softmax": flops}, 1.0, n_embd)
             for name, loss, flops, n_embd in (("a", 2.0, 1e15, 8), ("b", 1.6, 9e15, 16))]
    with pytest.raises(BadInput, match="--picture shows differences"):
        printed(capsys, monkeypatch, *alone, f"--picture={tmp_path / 'ladder.png'}")


def test_an_arm_that_took_no_time_has_no_multiplier(tmp_path, capsys, monkeypatch):
    flops = {"softmax": 1e15, "lln": 1e15}
    small = write(tmp_path / "a", {"softmax": 2.0, "lln": 1.9}, flops, 0.0, 8)
    large = write(tmp_path / "b", {"softmax": 1.6, "lln": 1.7},
                  {"softmax": 9e15, "lln": 9e15}, 2, 16)
    table, _ = printed(capsys, monkeypatch, small, large)
    [of_lln, _] = [row for (_, arm), row in table.items() if arm == "lln"]
    assert of_lln[7] == "n/a"


def test_names_in_the_picture_are_short():
    assert ladder_plot.shortened("a+a+a+b") == "3 a+b"
    assert ladder_plot.shortened("a+b conv=4") == "a+b conv=4"


def test_what_cannot_be_a_ladder_is_refused(sizes, tmp_path, capsys, monkeypatch):
    with pytest.raises(BadInput, match="a folder for each of two sizes"):
        printed(capsys, monkeypatch, sizes[0])
    other = write(tmp_path / "c", {"softmax": 1.5}, {"softmax": 1e15}, 1, 16, block_size=32)
    with pytest.raises(BadInput, match="differ in block_size"):
        printed(capsys, monkeypatch, sizes[0], other)
    only = write(tmp_path / "d", {"lln": 1.5}, {"lln": 1e15}, 1, 16)
    with pytest.raises(BadInput, match="other baselines: softmax, lln"):
        printed(capsys, monkeypatch, sizes[0], only)


# -- rates over widths -----------------------------------------------------------------------------

def test_the_lowest_rate_is_that_of_a_parabola_in_its_logarithm():
    losses = {rate: 2 + math.log(rate / 0.01) ** 2 for rate in (0.002, 0.004, 0.016, 0.032)}
    assert ladder.lowest_rate(losses) == pytest.approx(0.01)  # also where the steps are unequal
    assert ladder.lowest_rate({0.1: 1.0, 0.2: 2.0, 0.4: 3.0}) is None  # at the edge
    assert ladder.lowest_rate({0.1: 1.0}) is None


def test_rates_of_two_widths(tmp_path, capsys, monkeypatch):
    folders = []
    for n_embd, best in ((8, 0.02), (16, 0.01)):
        runs = [tuning("softmax", rate, 2 + math.log(rate / best) ** 2)
                for rate in (.005, .01, .02, .04)]
        runs += [tuning("lln", rate, 2 - rate) for rate in (.01, .02)]
        for record in runs:
            record.config["n_embd"] = n_embd
        again = tuning("softmax", best, 5.0)  # with a further seed, of the best rates alone
        again.config |= {"n_embd": n_embd, "seed": LATER_SEEDS}
        again.name += "-later"
        folders.append(str(tmp_path / str(n_embd)))
        records.write_records(folders[-1], [*runs, again])
    monkeypatch.setattr(sys, "argv", ["ladder", *folders, "--rates"])
    ladder.main.__wrapped__()
    rows = [line[2:-2].split(" | ") for line in capsys.readouterr().out.splitlines()]
    [narrow, wide] = [row for row in rows if row[2] == "softmax"]
    assert narrow[0] == "8" and wide[0] == "16" and narrow[5] == "2.0000"
    assert narrow[-2:] == ["0.02", ""] and wide[-2:] == ["0.01", "0.50"]
    assert all(row[3:5] == ["", "1.9900"] and row[-2] == "n/a" for row in rows if row[2] == "lln")
    monkeypatch.setattr(sys, "argv", ["ladder", str(tmp_path), "--rates"])
    with pytest.raises(BadInput, match="no run that chose a learning rate"):
        ladder.main.__wrapped__()
    for other in ("--picture=a.png", "--baseline=lln"):
        monkeypatch.setattr(sys, "argv", ["ladder", *folders, "--rates", other])
        with pytest.raises(BadInput, match="leave --baseline and --picture out"):
            ladder.main.__wrapped__()
