"""sample.py: the same seed the same text, through the state; prompts; what it refuses; text of several bytes a character."""
import os
import re
import shutil
import subprocess
import sys

import pytest
import torch
from conftest import TINY, one_line, run

from training import checkpoint

END = "\n---------------\n"


@pytest.fixture(scope="session")
def model(trained):
    """The model and the tokenizer of the shared run."""
    run = checkpoint.load(trained)
    return checkpoint.build_model(run), run.tokenizer


def texts(out):
    """The samples in what was printed."""
    assert out.endswith(END)
    return out.split(END)[:-1]


def likeliest(model, tokens, n, half):
    """n tokens behind `tokens`, each by a pass over everything so far; at block_size only the last half is kept."""
    context, new = list(tokens), []
    for _ in range(n):
        if len(context) > model.config.block_size:
            context = context[-half:]
        with torch.no_grad():
            new.append(model(torch.tensor([context]))[0][0, -1].argmax().item())
        context.append(new[-1])
    return new


# -- what comes out ---------------------------------------------------------------------------------------------------

def test_a_seed_gives_the_same_samples_and_another_seed_others(sample, trained, home):
    first = sample(f"--out_dir={trained}", "--max_new_tokens=40", "--num_samples=2")
    done = run(home, "sample.py", "--out_dir", trained, "--max_new_tokens=40", "--num_samples=2")
    assert done.returncode == 0 and done.stdout == first
    a, b = texts(first)
    assert a != b and len(a) == len(b) == 1 + 40  # a line break comes first
    assert sample(f"--out_dir={trained}", "--max_new_tokens=40", "--num_samples=2", "--seed=5") != first


def test_the_speed_goes_to_standard_error_and_the_text_alone_to_standard_output(sample, trained):
    out = sample(f"--out_dir={trained}", "--max_new_tokens=7", "--num_samples=3", "--start=abc")
    assert re.fullmatch(r"21 tokens in [\d.]+ s: [\d,]+ tokens/s\n", sample.err)
    assert len(texts(out)) == 3 and "tokens" not in out
    assert all(text.startswith("abc") and len(text) == 10 for text in texts(out))


def test_temperature_0_takes_the_likeliest_and_so_does_top_1(sample, trained, model):
    model, tokenizer = model
    expected = "ab " + tokenizer.decode(likeliest(model, tokenizer.encode("ab "), 13, 8))
    for argument in ("--temperature=0", "--top_k=1"):
        assert texts(sample(f"--out_dir={trained}", "--start=ab ", argument, "--max_new_tokens=13")) == [expected] * 3


def test_past_block_size_the_last_half_block_is_read_again(sample, trained, model):
    model, tokenizer = model
    expected = tokenizer.decode(likeliest(model, tokenizer.encode("abc"), 60, 8))
    assert texts(sample(f"--out_dir={trained}", "--start=abc", "--temperature=0", "--max_new_tokens=60", "--num_samples=1")) == ["abc" + expected]


def test_a_prompt_longer_than_the_block(sample, trained, here):
    prompt = "a quick brown fox jumps over the lazy dog\n" * 3
    (here / "prompt.txt").write_text(prompt)
    [text] = texts(sample(f"--out_dir={trained}", "--start=FILE:prompt.txt", "--max_new_tokens=20", "--num_samples=1"))
    assert text.startswith(prompt) and len(text) == len(prompt) + 20


@pytest.mark.parametrize("k", [2, 5])
def test_top_k_draws_among_the_k_likeliest_only(sample, trained, model, k):
    model, tokenizer = model
    ranks = set()
    for text in texts(sample(f"--out_dir={trained}", "--start=ab", f"--top_k={k}", "--temperature=5", "--max_new_tokens=14", "--num_samples=8")):
        tokens = torch.tensor([tokenizer.encode(text)])
        with torch.no_grad():
            order = model(tokens)[0][0].argsort(-1, descending=True)
        ranks |= {order[t - 1].tolist().index(tokens[0, t]) for t in range(2, 16)}
    assert ranks == set(range(k))
    assert sample(f"--out_dir={trained}", "--top_k=1000", "--max_new_tokens=20") == sample(f"--out_dir={trained}", "--max_new_tokens=20")


def test_a_high_temperature_flattens_and_a_low_one_sharpens(sample, trained):
    draw = lambda temperature: "".join(texts(sample(f"--out_dir={trained}", f"--temperature={temperature}", "--max_new_tokens=100")))
    assert len(set(draw(1e6))) > 20 > len(set(draw(0.02)))


@pytest.mark.parametrize("temperature", [1e-30, 1e-40, 1e-300, 1e30])
def test_an_extreme_temperature_is_no_error(sample, trained, temperature):
    out = sample(f"--out_dir={trained}", "--start=ab", f"--temperature={temperature}", "--max_new_tokens=10")
    if temperature < 1:
        assert out == sample(f"--out_dir={trained}", "--start=ab", "--temperature=0", "--max_new_tokens=10")


def test_a_prompt_may_come_from_a_file(sample, trained, here):
    (here / "prompt.txt").write_text("abc def\n")
    arguments = [f"--out_dir={trained}", "--max_new_tokens=10"]
    assert sample(*arguments, "--start=FILE:prompt.txt") == sample(*arguments, "--start", "abc def\n")


def test_the_best_and_a_named_checkpoint(sample, trained):
    draw = lambda *more: sample(f"--out_dir={trained}", "--max_new_tokens=30", *more)
    assert draw() == draw("--checkpoint=best") == draw("--checkpoint=00000020") != draw("--checkpoint=00000010")


def test_a_run_needs_neither_its_data_nor_its_place(trained, tmp_path, clone):
    """In a clone without any data set, from a copy of one checkpoint folder alone."""
    for path in (clone / "data").iterdir():
        if path.is_dir():
            shutil.rmtree(path)
    shutil.copytree(trained / "checkpoints/00000020", tmp_path / "elsewhere/checkpoints/00000020")
    done = run(clone, "sample.py", "--out_dir", tmp_path / "elsewhere", "--max_new_tokens=30", "--num_samples=1")
    assert done.returncode == 0 and len(texts(done.stdout)[0]) == 31, done


def test_llama_goes_on_past_its_block_size(train, sample, here):
    train(*TINY, "--arch=llama", "--max_iters=5", "--out_dir=run")
    loaded = checkpoint.load(here / "run")
    model, tokenizer = checkpoint.build_model(loaded), loaded.tokenizer
    tokens = tokenizer.encode("ab")
    for _ in range(40):
        with torch.no_grad():
            tokens.append(model.step(torch.tensor([tokens]))[0][0, -1].argmax().item())
    assert texts(sample("--out_dir=run", "--start=ab", "--temperature=0", "--max_new_tokens=40", "--num_samples=1")) == [tokenizer.decode(tokens)]


def test_characters_of_several_bytes_stream_whole(train, sample, here, home, tmp_path, monkeypatch):
    """A byte-level tokenizer of GPT-2's kind without merges: each of these characters is two to four tokens."""
    import data.dataset
    from data.files import write_text_dataset
    from data.tokenizer import gpt2_tokenizer
    monkeypatch.setattr(data.dataset, "DATA", tmp_path / "data")
    (tmp_path / "data").mkdir()
    write_text_dataset(tmp_path / "data/bytes", "é€😀" * 500, gpt2_tokenizer("#version: 0.2\n"), "0" * 64, "data.text")
    train(*TINY, "--dataset=bytes", "--n_embd=32", "--max_iters=150", "--out_dir=run")
    done = run(home, "sample.py", "--out_dir", here / "run", "--start=é", "--temperature=0", "--max_new_tokens=34", "--num_samples=1")
    assert done.stdout.startswith("é€😀é€😀é€😀é") and "\ufffd" not in done.stdout, done
    wire = subprocess.Popen([sys.executable, "sample.py", "--out_dir", str(here / "run"), "--start=é", "--temperature=0", "--max_new_tokens=4000",
                             "--num_samples=1"], cwd=home, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    first = os.read(wire.stdout.fileno(), 100)  # what is there before the end: it streams, and in whole characters
    assert first.decode().startswith("é") and wire.poll() is None
    wire.stdout.close()  # like head, which has seen enough
    assert b"Traceback" not in wire.communicate()[1]


# -- bad input --------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("argv, naming", [
    (["--start=Abc!"], ["'A'", "'!'"]),
    (["--start=é\n"], ["'é'"]),
    (["--start="], ["--start", "empty"]),
    (["--start=FILE:nowhere.txt"], ["nowhere.txt"]),
    (["--start=FILE:."], ["FILE:."]),
    (["--start=FILE:empty.txt"], ["empty"]),
    (["--start=FILE:binary"], ["binary", "UTF-8"]),
    (["--checkpoint=00000015"], ["00000015", "00000010", "00000020"]),
    (["--num_samples=0"], ["num_samples"]),
    (["--max_new_tokens=-1"], ["max_new_tokens"]),
    (["--temperature=-1"], ["temperature"]),
    (["--top_k=0"], ["top_k"]),
    (["--temperatur=1"], ["--temperatur", "--temperature"]),
    (["--device=nope"], ["nope"]),
    (["--seed=x"], ["seed"]),
    (["stray"], ["stray"]),
])
def test_bad_input_is_named_in_one_line(sample, trained, here, argv, naming):
    (here / "empty.txt").write_text("")
    (here / "binary").write_bytes(b"\xff\xfe\x00")
    line = sample.refuses(f"--out_dir={trained}", *argv)
    assert all(name in line for name in naming), line


def test_a_run_that_is_not_there(sample, here):
    assert "--out_dir" in sample.refuses()
    assert "out/nowhere" in sample.refuses("--out_dir=out/nowhere")
    (here / "empty").mkdir()
    assert "empty" in sample.refuses("--out_dir=empty")


def test_a_damaged_newest_checkpoint_ends_with_the_names_of_the_whole_ones(home, run_folder, sample):
    (run_folder / "checkpoints/00000020/model.safetensors").write_bytes(b"gone")
    line = one_line(run(home, "sample.py", "--out_dir", run_folder))
    assert "00000020" in line and "model.safetensors" in line and "whole: 00000010" in line
    assert sample("--out_dir", run_folder, "--checkpoint=00000010", "--max_new_tokens=5")
