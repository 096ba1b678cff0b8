"""Generated bad inputs: options, config files, data, checkpoints, prompts. Each ends with one line and status 2, harming nothing.

`python -m pytest tests/test_fuzz.py` draws 60 of them, `-m slow` 300 others.
"""
import json
import random
import shutil
import string
import typing
from dataclasses import fields

import pytest
from conftest import TINY

from base.command_line import is_bool
from config import Options
from training.checkpoint import FILES

JUNK = ["", " ", "x", "1x", "--", "1,5", "0x10", "1e", "None of it", "[]", "{}", "é", "\u202e", "1 2", "__import__('os')", "$HOME", "%s%n"]


def word(draw):
    return "".join(draw.choices(string.ascii_lowercase, k=draw.randint(3, 12)))


def bad_value(f, draw):
    """A text that option f cannot take, or None for one that takes any."""
    kinds = [t for t in (typing.get_args(f.type) or [f.type]) if t is not type(None)]
    if is_bool(f.type):
        return draw.choice(["maybe", "2", "yes please"])
    if kinds[0] in (int, float):
        limits = f.default.metadata
        low = next((getattr(limit, "ge", getattr(limit, "gt", None)) for limit in limits if hasattr(limit, "ge") or hasattr(limit, "gt")), 0)
        return draw.choice([*JUNK, str(low - draw.randint(1, 10**6)), "nan", "inf", "1" * 400 if kinds[0] is float else "2.5"])
    if kinds[0] is str:
        return {"mixer": word(draw) + "!", "dataset": draw.choice(["../letters", word(draw) + "_", "", "a/b"]), "device": word(draw),
                "mixer_file": word(draw) + ".py", "init_from": word(draw)}.get(f.name)
    return word(draw) + "?"  # a choice


def fuzz_options(draw, tools):
    f = draw.choice(fields(Options))
    value = bad_value(f, draw)
    if value is None or draw.random() < 0.2:  # a name that is none
        name = list(f.name)
        name[draw.randrange(len(name))] = draw.choice("QZ#")
        tools.train.refuses(*TINY, f"--{''.join(name)}={draw.randint(0, 9)}", unchanged=tools.folder)
    else:
        tools.train.refuses(*TINY, f"--{f.name}={value}", unchanged=tools.folder)


def fuzz_config(draw, tools):
    f = draw.choice([f for f in fields(Options) if f.name not in ("out_dir",)])
    bad = draw.choice([object, [1], {"a": 1}, b"bytes", 1j, (1, 2)])
    text = draw.choice([
        f"{f.name} = {bad!r}\n" if bad is not object else f"{f.name} = object()\n",
        f"{f.name}_{word(draw)} = 1\n", f"{f.name} = \n", f"def {f.name}(:\n", "import " + word(draw) + "_\n", "1 / 0\n",
        f"raise RuntimeError('{word(draw)}\\nand more')\n", "x" * draw.randint(1, 50) + "\n", "\0", "from configs.nothing import *\n",
        "import sys\nsys.exit()\n" if draw.random() < 0.3 else f"  {f.name} = 1\n",
    ])
    path = tools.folder.parent / "fuzz.py"
    path.write_bytes(text.encode() if draw.random() < 0.9 else draw.randbytes(40) + b"\xff(")
    tools.train.refuses(path, *TINY, unchanged=tools.folder)


def fuzz_data(draw, tools):
    folder = tools.data / "letters"
    shutil.rmtree(folder)
    shutil.copytree(tools.home / "data" / "letters", folder)
    path = folder / draw.choice(["train.bin", "val.bin", "meta.json"])
    raw = path.read_bytes()
    if path.suffix == ".bin":
        at = draw.randrange(len(raw) // 2) * 2
        path.write_bytes(draw.choice([raw[:draw.randrange(len(raw))], raw + b"\0" * draw.randint(1, 9), b"",
                                      raw[:at] + (28 + draw.randrange(60000)).to_bytes(2, "little") + raw[at + 2:]]))
    else:
        meta = json.loads(raw)
        key = draw.choice(["vocab_size", "dtype", "train_tokens", "val_tokens", "val_bytes"])
        if draw.random() < 0.3:
            path.write_bytes(draw.choice([raw[:draw.randrange(len(raw) - 2)], b"[]", b"null", b"\xff\xfe", draw.randbytes(30), b"[" * 100000]))
        else:
            meta.pop(key) if draw.random() < 0.3 else meta.update({key: draw.choice([None, -1, 0, "x", [], 1.5, True, {}])})
            path.write_text(json.dumps(meta))
    if draw.random() < 0.1:
        path.unlink()
        if path.name == "meta.json":
            (folder / "train.bin").unlink()
    tools.train.refuses(*TINY, unchanged=tools.folder)


def fuzz_checkpoint(draw, tools):
    for step in ("00000010", "00000020"):  # neither is whole, so no other can take its place
        path = tools.folder / "checkpoints" / step / draw.choice([*FILES, "manifest.json"])
        raw = path.read_bytes()
        at = draw.randrange(len(raw))
        path.write_bytes(draw.choice([raw[:at], raw[:at] + bytes([raw[at] ^ (1 << draw.randrange(8))]) + raw[at + 1:],
                                      draw.randbytes(draw.randint(0, 200)), b"", raw + b" " if path.name != "manifest.json" else b"{}"]))
        if draw.random() < 0.2:
            path.unlink()
    command = draw.choice([(tools.sample, "--num_samples=1"), (tools.train, "--eval_only"), (tools.train, "--resume", *TINY),
                           (tools.train, f"--init_from={tools.folder}", *TINY)])
    script, *arguments = command
    own = [] if arguments[0].startswith("--init_from") else [f"--out_dir={tools.folder}"]
    script.refuses(*arguments, *own, unchanged=tools.folder)
    shutil.rmtree(tools.folder)
    shutil.copytree(tools.trained, tools.folder)


def fuzz_prompt(draw, tools):
    outside = "".join(draw.choices("ÄÖÜ0123456789{}€日\0\U0001f600", k=draw.randint(1, 5)))
    bad = tools.folder.parent / "prompt.txt"
    bad.write_bytes(draw.choice([b"", b"\xff\xfe", outside.encode()]))
    arguments = draw.choice([[f"--start={draw.choice(['', 'abc '])}{outside}"], ["--start="], [f"--start=FILE:{word(draw)}"], [f"--start=FILE:{bad}"],
                             ["--start=FILE:"], ["--top_k=0"], [f"--temperature=-{draw.random()}"], ["--num_samples=0"],
                             [f"--checkpoint={draw.choice([word(draw), '00000015', '../..', ''])}"], [f"--{word(draw)}=1"], [word(draw)]])
    tools.sample.refuses(f"--out_dir={tools.folder}", *arguments, unchanged=tools.folder)


@pytest.fixture
def tools(train, sample, run_folder, trained, home, tmp_path, monkeypatch):
    import data.dataset
    import data.files
    own = shutil.copytree(home / "data", tmp_path / "data")
    for module in (data.files, data.dataset):
        monkeypatch.setattr(module, "DATA", own)
    values = dict(train=train, sample=sample, folder=run_folder, trained=trained, home=home, data=own)
    return type("Tools", (), values)


def fuzz(tools, seed, count):
    kinds = [fuzz_options, fuzz_config, fuzz_checkpoint, fuzz_prompt, fuzz_data]
    for i in range(count):
        kind = kinds[i * len(kinds) // count]  # in order: damaged data come last
        try:
            kind(random.Random(f"{seed} {i}"), tools)
        except BaseException as error:
            raise AssertionError(f"case {i} of seed {seed}, {kind.__name__}: {error!r}") from error


def test_60_bad_inputs(tools):
    fuzz(tools, seed=1, count=60)


@pytest.mark.slow
@pytest.mark.parametrize("seed", [2])
def test_300_bad_inputs(tools, seed):
    fuzz(tools, seed, count=300)
