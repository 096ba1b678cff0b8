"""Generated bad inputs: options, config files, data, checkpoints, prompts.

Each ends with one line and status 2, harming nothing. `python -m pytest tests/test_fuzz.py` draws
60 of them, `-m slow` 300 others.
"""
import json
import random
import shutil
import string
import typing
from dataclasses import fields
from types import SimpleNamespace

import pytest
from conftest import TINY

from base.command_line import is_bool
from config import Options
from training.checkpoint import FILES

JUNK = ["", " ", "x", "1x", "--", "1,5", "0x10", "1e", "None of it", "[]", "{}", "é", "\u202e",
        "1 2", "__import__('os')", "$HOME", "%s%n"]


def word(draw):
    return "".join(draw.choices(string.ascii_lowercase, k=draw.randint(3, 12)))


def bad_value(f, draw):
    """A text that option f cannot take, or None for one that takes any."""
    kinds = [t for t in (typing.get_args(f.type) or [f.type]) if t is not type(None)]
    if is_bool(f.type):
        return draw.choice(["maybe", "2", "yes please"])
    if kinds[0] in (int, float):
        too_low = lowest(f) - draw.randint(1, 10**6)
        other = "1" * 400 if kinds[0] is float else "2.5"
        return draw.choice([*JUNK, str(too_low), "nan", "inf", other])
    if kinds[0] is str:
        bad = {
            "mixer": word(draw) + "!",
            "dataset": draw.choice(["../letters", word(draw) + "_", "", "a/b"]),
            "device": word(draw),
            "mixer_file": word(draw) + ".py",
            "init_from": word(draw),
        }
        return bad.get(f.name)
    return word(draw) + "?"  # a choice


def lowest(f):
    """The smallest value that the limits of option f allow, or 0."""
    for limit in f.default.metadata:
        for name in ("ge", "gt"):
            if hasattr(limit, name):
                return getattr(limit, name)
    return 0


def fuzz_options(draw, tools):
    f = draw.choice(fields(Options))
    value = bad_value(f, draw)
    if value is None or draw.random() < 0.2:  # a name that is none
        name = list(f.name)
        name[draw.randrange(len(name))] = draw.choice("QZ#")
        name = "".join(name)
        tools.train.refuses(*TINY, f"--{name}={draw.randint(0, 9)}", unchanged=tools.folder)
    else:
        tools.train.refuses(*TINY, f"--{f.name}={value}", unchanged=tools.folder)


def fuzz_config(draw, tools):
    f = draw.choice([f for f in fields(Options) if f.name != "out_dir"])
    bad = draw.choice(["object()", "[1]", "{'a': 1}", "b'bytes'", "1j", "(1, 2)"])
    text = draw.choice([
        f"{f.name} = {bad}\n",
        f"{f.name}_{word(draw)} = 1\n",
        f"{f.name} = \n",
        f"def {f.name}(:\n",
        f"import {word(draw)}_\n",
        "1 / 0\n",
        f"raise RuntimeError('{word(draw)}\\nand more')\n",
        "x" * draw.randint(1, 50) + "\n",
        "\0",
        "from configs.nothing import *\n",
        "import sys\nsys.exit()\n" if draw.random() < 0.3 else f"  {f.name} = 1\n",
    ])
    path = tools.folder.parent / "fuzz.py"
    no_utf_8 = draw.randbytes(40) + b"\xff("
    path.write_bytes(text.encode() if draw.random() < 0.9 else no_utf_8)
    tools.train.refuses(path, *TINY, unchanged=tools.folder)


def fuzz_data(draw, tools):
    folder = tools.data / "letters"
    shutil.rmtree(folder)
    shutil.copytree(tools.home / "data" / "letters", folder)
    path = folder / draw.choice(["train.bin", "val.bin", "meta.json"])
    if path.suffix == ".bin":
        damage_tokens(draw, path)
    else:
        damage_meta(draw, path)
    if draw.random() < 0.1:
        path.unlink()
        if path.name == "meta.json":
            (folder / "train.bin").unlink()
    tools.train.refuses(*TINY, unchanged=tools.folder)


def damage_tokens(draw, path):
    raw = path.read_bytes()
    at = draw.randrange(len(raw) // 2) * 2
    outside = (28 + draw.randrange(60000)).to_bytes(2, "little")
    path.write_bytes(draw.choice([
        raw[:draw.randrange(len(raw))],
        raw + b"\0" * draw.randint(1, 9),
        b"",
        raw[:at] + outside + raw[at + 2:],
    ]))


def damage_meta(draw, path):
    raw = path.read_bytes()
    key = draw.choice(["vocab_size", "dtype", "train_tokens", "val_tokens", "val_bytes"])
    if draw.random() < 0.3:
        path.write_bytes(draw.choice([
            raw[:draw.randrange(len(raw) - 2)], b"[]", b"null", b"\xff\xfe", draw.randbytes(30),
            b"[" * 100000,
        ]))
        return
    meta = json.loads(raw)
    if draw.random() < 0.3:
        del meta[key]
    else:
        meta[key] = draw.choice([None, -1, 0, "x", [], 1.5, True, {}])
    path.write_text(json.dumps(meta))


def fuzz_checkpoint(draw, tools):
    for step in ("00000010", "00000020"):  # neither is whole, so no other can take its place
        name = draw.choice([*FILES, "manifest.json"])
        path = tools.folder / "checkpoints" / step / name
        raw = path.read_bytes()
        at = draw.randrange(len(raw))
        flipped = bytes([raw[at] ^ (1 << draw.randrange(8))])
        path.write_bytes(draw.choice([
            raw[:at],
            raw[:at] + flipped + raw[at + 1:],
            draw.randbytes(draw.randint(0, 200)),
            b"",
            raw + b" " if name != "manifest.json" else b"{}",
        ]))
        if draw.random() < 0.2:
            path.unlink()
    script, *arguments = draw.choice([
        (tools.sample, "--num_samples=1", f"--out_dir={tools.folder}"),
        (tools.train, "--eval_only", f"--out_dir={tools.folder}"),
        (tools.train, "--resume", *TINY, f"--out_dir={tools.folder}"),
        (tools.train, f"--init_from={tools.folder}", *TINY),
    ])
    script.refuses(*arguments, unchanged=tools.folder)
    shutil.rmtree(tools.folder)
    shutil.copytree(tools.trained, tools.folder)


def fuzz_prompt(draw, tools):
    symbols = "ÄÖÜ0123456789{}€日\0\U0001f600"
    outside = "".join(draw.choices(symbols, k=draw.randint(1, 5)))
    bad = tools.folder.parent / "prompt.txt"
    bad.write_bytes(draw.choice([b"", b"\xff\xfe", outside.encode()]))
    argument = draw.choice([
        f"--start={draw.choice(['', 'abc '])}{outside}",
        "--start=",
        f"--start=FILE:{word(draw)}",
        f"--start=FILE:{bad}",
        "--start=FILE:",
        "--top_k=0",
        f"--temperature=-{draw.random()}",
        "--num_samples=0",
        f"--checkpoint={draw.choice([word(draw), '00000015', '../..', ''])}",
        f"--{word(draw)}=1",
        word(draw),
    ])
    tools.sample.refuses(f"--out_dir={tools.folder}", argument, unchanged=tools.folder)


@pytest.fixture
def tools(train, sample, run_folder, trained, home, tmp_path, monkeypatch):
    import data.dataset
    import data.files
    own = shutil.copytree(home / "data", tmp_path / "data")
    for module in (data.files, data.dataset):
        monkeypatch.setattr(module, "DATA", own)
    return SimpleNamespace(train=train, sample=sample, folder=run_folder, trained=trained,
                           home=home, data=own)


def fuzz(tools, seed, count):
    kinds = [fuzz_options, fuzz_config, fuzz_checkpoint, fuzz_prompt, fuzz_data]
    for i in range(count):
        kind = kinds[i * len(kinds) // count]  # in order: damaged data come last
        try:
            kind(random.Random(f"{seed} {i}"), tools)
        except BaseException as error:
            where = f"case {i} of seed {seed}, {kind.__name__}"
            raise AssertionError(f"{where}: {error!r}") from error


def test_60_bad_inputs(tools):
    fuzz(tools, seed=1, count=60)


@pytest.mark.slow
@pytest.mark.parametrize("seed", [2])
def test_300_bad_inputs(tools, seed):
    fuzz(tools, seed, count=300)
