"""Every command of the README runs, shortened, in order, in a copy of the repository."""
import re
import shlex
import shutil
import subprocess
import sys

import pytest
from conftest import ROOT, copy_repository

from data import load_dataset

SHORTER = {"train.py": "--max_iters=2 --eval_tokens=3000", "sample.py": "--num_samples=1 --max_new_tokens=20",
           "tools.inspect_attention": "--length=16",
           "bench.py": "--lengths=16,32 --mode=prefill --rounds=1 --seconds=0.01"}


def blocks(language):
    return re.findall(rf"^```{language}\n(.*?)^```$", (ROOT / "README.md").read_text(), re.DOTALL | re.MULTILINE)


def commands():
    return [command.strip() for block in blocks("sh") for line in block.splitlines() for command in line.split("&&")]


def test_the_two_commands_for_newcomers_are_there():
    text = (ROOT / "README.md").read_text()
    assert "pip install -r requirements.txt && python train.py configs/shakespeare_pelican.py" in text
    assert "pip install -r requirements.txt -r requirements-dev.txt && python -m pytest" in text


def test_every_mixer_and_every_file_named_is_there():
    from mixers import MIXERS
    text = (ROOT / "README.md").read_text()
    assert not [name for name in re.findall(r"(?:configs|mixers|tools)/\w+\.py", text) if not (ROOT / name).exists()]
    table = re.findall(r"^\| (`.*?`) \|", text, re.MULTILINE)
    listed = {name for row in table for name in re.findall(r"`(\w+)`", row)} - {"mixer"}
    assert listed == set(MIXERS)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = copy_repository(tmp_path_factory.mktemp("readme"))
    load_dataset("shakespeare_char", 64)
    shutil.copytree(ROOT / "data" / "shakespeare_char", folder / "data" / "shakespeare_char", dirs_exist_ok=True)
    (folder / "mine.py").write_text(blocks("python")[0])
    (folder / "my.txt").write_text("It was a bright cold day in April, and the clocks were striking thirteen.\n" * 40)
    return folder


def test_every_command_runs(folder):
    ran = []
    for command in commands():
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
    assert len(ran) >= 12
