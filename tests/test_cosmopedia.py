"""data/cosmopedia on made-up files in the schema of the data set: tokens against a slow reading, interruptions, bad files."""
import fcntl
import hashlib
import json
import multiprocessing
import os
import random
import signal
import sys
import types

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from conftest import ROOT, content, copy_repository, one_line, run

from base.errors import BadInput
from data import dataset, load_dataset
from data.cosmopedia import prepare as cosmopedia
from data.tokenizer import gpt2_tokenizer

END = 50256
ODD = ["", None, "  \n ", "née 漢字 🙂", "said <|endoftext|> and went on", " leading", "trailing \n\n", "a" * 3000, "tab\there\r\n", "\0", "\x1c."]


@pytest.fixture(scope="session")
def tokenizer(vocab_bpe):
    return gpt2_tokenizer(vocab_bpe.decode())


@pytest.fixture(scope="session")
def texts():
    """1,500 documents, some of them odd, the first one twice."""
    draw = random.Random(1)
    words = ["".join(draw.choices("abcdefghij", k=draw.randint(1, 8))) for _ in range(99)]
    plain = [" ".join(draw.choices(words, k=draw.randint(1, 30))) for _ in range(1500)]
    return plain[:40] + ODD + plain[40:] + plain[:1]


@pytest.fixture(autouse=True)
def gpt2_is_here(tokenizer, monkeypatch):
    monkeypatch.setattr(cosmopedia, "gpt2", lambda folder: tokenizer)


@pytest.fixture
def folder(tmp_path):
    folder = tmp_path / "cosmopedia"
    folder.mkdir()
    return folder


def rows_of(texts):
    return [{"prompt": f"Write about {i}.", "text_token_length": i, "text": text, "seed_data": "web_samples_v1", "format": "textbook",
             "audience": "young_children"} for i, text in enumerate(texts)]


def write_parquet(path, texts, row_group_size=100):
    rows = rows_of(texts)
    table = pyarrow.table({key: [row[key] for row in rows] for key in rows[0]})
    pyarrow.parquet.write_table(table, path, row_group_size=row_group_size)
    return path


def write_jsonl(path, texts):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows_of(texts)))
    return path


def prepare(path, folder, limit=None, workers=2):
    cosmopedia.prepare(cosmopedia.Files(path), limit, folder, workers)
    return json.loads((folder / "meta.json").read_text())


def tokens(folder):
    return {split: np.fromfile(folder / f"{split}.bin", "<u2") for split in ("train", "val")}


def documents(folder, tokenizer):
    """Split -> its documents, decoded."""
    found = {}
    for split, ids in tokens(folder).items():
        assert ids[-1] == END
        found[split] = [tokenizer.decode(part[:-1].tolist()) for part in np.split(ids, np.flatnonzero(ids == END) + 1)[:-1]]
    return found


def kept(texts):
    return [text for text in texts if isinstance(text, str) and text.strip()]


def for_validation(text):
    return int(hashlib.sha256(text.encode()).hexdigest()[:16], 16) / 2**64 < 0.005


def killed_at_rename(number, work):
    """Run work() in a process that is killed where it would rename a file for the number-th time, from the end if negative."""
    count = multiprocessing.Value("i", 0)

    def child(stop):
        def replace(source, target, rename=os.replace):
            count.value += 1
            if count.value == stop:
                os.kill(os.getpid(), signal.SIGKILL)
            rename(source, target)
        os.replace = replace
        work()

    process = multiprocessing.get_context("fork").Process(target=child, args=(number,))
    process.start()
    process.join()
    return process.exitcode


# -- tokens -----------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("kind", ["parquet", "jsonl", "folder"])
def test_tokens_against_a_slow_reading(kind, texts, tokenizer, folder, tmp_path, monkeypatch):
    monkeypatch.setattr(cosmopedia, "BATCH", 7000)
    source = tmp_path / f"source.{kind}"
    if kind == "folder":
        (source / "data").mkdir(parents=True)
        (source / "README.md").write_text("no data")
        write_parquet(source / "data" / "train-00000-of-00002.parquet", texts[:700])
        write_jsonl(source / "data" / "train-00001-of-00002.jsonl", texts[700:])
        files = sorted((source / "data").iterdir())
    else:
        files = [{"parquet": write_parquet, "jsonl": write_jsonl}[kind](source, texts)]
    meta = prepare(source, folder)
    for split, ids in tokens(folder).items():
        mine = [text for text in kept(texts) if for_validation(text) == (split == "val")]
        assert ids.tolist() == [i for text in mine for i in [*tokenizer.encode(text), END]]
        assert meta[f"{split}_tokens"] == len(ids) and meta[f"{split}_documents"] == len(mine) > 2
        assert meta[f"{split}_bytes"] == len("".join(mine).encode())
    assert documents(folder, tokenizer)["train"] == [text for text in kept(texts) if not for_validation(text)]
    assert (meta["vocab_size"], meta["dtype"], meta["tokenizer"], meta["limit"]) == (50257, "uint16", "gpt2", None)
    assert (meta["empty_documents"], meta["non_string_documents"], meta["huge_documents"]) == (2, 1, 0)
    assert meta["source"] == str(source) and meta["made_by"] == "data/cosmopedia/prepare.py"
    assert meta["source_sha256"] == hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()
    assert {p.name for p in folder.iterdir()} == {"train.bin", "val.bin", "tokenizer.json", "meta.json", "lock.tmp"}


def test_training_reads_it(texts, tokenizer, folder, tmp_path, monkeypatch):
    monkeypatch.setattr(dataset, "DATA", tmp_path)
    meta = prepare(write_parquet(tmp_path / "a.parquet", texts), folder)
    loaded = load_dataset("cosmopedia", 32)
    assert len(loaded.train) == meta["train_tokens"] and loaded.batch(1, 2, 4, 32)[0].shape == (4, 32)
    assert tokenizer.decode(loaded.val.tolist()) == loaded.tokenizer.decode(loaded.val.tolist())


def test_the_split_depends_on_the_text_alone(texts, tokenizer, folder, tmp_path):
    prepare(write_jsonl(tmp_path / "a.jsonl", texts), folder)
    first = documents(folder, tokenizer)
    shuffled = random.Random(2).sample(texts, len(texts))
    prepare(write_jsonl(tmp_path / "a.jsonl", shuffled), folder)
    second = documents(folder, tokenizer)
    assert {split: sorted(found) for split, found in first.items()} == {split: sorted(found) for split, found in second.items()}
    assert not set(first["train"]) & set(first["val"])


def test_one_thread_or_many_and_any_batch(texts, folder, tmp_path, monkeypatch):
    source = write_parquet(tmp_path / "a.parquet", texts, row_group_size=333)
    prepare(source, folder, workers=1)
    first = content(folder)
    for workers, batch in ((4, 2**22), (3, 9999), (2, 2000)):
        monkeypatch.setattr(cosmopedia, "BATCH", batch)
        prepare(source, folder, workers=workers)
        assert content(folder) == first


def test_values_that_are_no_text(tokenizer, folder, tmp_path):
    """Numbers, lists, half a surrogate pair; a row without text; a line without a row."""
    rows = [{"text": text} for text in ["one", 3, 4.5, True, ["a"], {"b": 1}, None, "", "two \ud83d.", "two", "x" * 2**20]] + [{"prompt": "none"}]
    (tmp_path / "a.jsonl").write_text("\n" + "\n\n".join(map(json.dumps, rows)))
    meta = prepare(tmp_path / "a.jsonl", folder)
    assert (meta["empty_documents"], meta["non_string_documents"], meta["huge_documents"]) == (1, 7, 1)
    found = documents(folder, tokenizer)
    assert sorted(found["train"] + found["val"]) == ["one", "two", "two \ufffd.", "x" * 2**20]

    pyarrow.parquet.write_table(pyarrow.table({"text": [1, 2, 3]}), tmp_path / "a.parquet")
    with pytest.raises(BadInput, match="a.parquet is too short: of its 3 rows 0 have text .left out: 0 empty, 3 no text"):
        prepare(tmp_path / "a.parquet", folder)
    assert not list(folder.glob("*.bin.tmp")) and tokens(folder)["val"].size  # the earlier one is as it was


def test_a_huge_document(tokenizer, folder, tmp_path):
    huge = "A sentence of a long document, number 3. " * 60_000
    meta = prepare(write_parquet(tmp_path / "a.parquet", ["before", huge, "after"], 1), folder)
    found = documents(folder, tokenizer)
    assert sorted(found["train"] + found["val"]) == [huge, "after", "before"] and meta["huge_documents"] == 1


def test_limit(texts, tokenizer, folder, tmp_path):
    for write, name in ((write_parquet, "a.parquet"), (write_jsonl, "a.jsonl")):
        meta = prepare(write(tmp_path / name, texts), folder, limit=45)
        found = documents(folder, tokenizer)
        assert sorted(found["train"] + found["val"]) == sorted(kept(texts[:45])) and meta["limit"] == 45
    assert len(found["val"]) == 1  # none is below 0.5 %: the lowest
    assert found["val"] == [min(kept(texts[:45]), key=lambda text: hashlib.sha256(text.encode()).hexdigest())]


# -- interruptions ----------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("number", [1, 2, 9, -5, -4, -3, -2, -1])
def test_a_killed_preparation_goes_on(number, texts, folder, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(cosmopedia, "BATCH", 10_000)
    source = write_parquet(tmp_path / "a.parquet", texts)
    whole = tmp_path / "whole"
    whole.mkdir()
    renames = []
    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", lambda a, b, rename=os.replace: renames.append(b) or rename(a, b))
        prepare(source, whole)
    assert len(renames) > 14
    stop = number if number > 0 else len(renames) + 1 + number
    assert killed_at_rename(stop, lambda: prepare(source, folder)) == -signal.SIGKILL
    assert not (folder / "meta.json").exists()
    capsys.readouterr()
    prepare(source, folder)
    went_on = "going on after" in capsys.readouterr().out
    assert went_on == (1 < stop <= len(renames) - 3)  # with something saved, and not yet moved into place
    orphans = {name for name in content(folder) if name.startswith(".")}  # of the rename that was not
    assert {name: file for name, file in content(folder).items() if name not in orphans} == content(whole)


@pytest.mark.parametrize("change", ["other texts", "fewer", "lost tokens", "older program", "none"])
def test_what_was_begun_is_taken_up_only_if_it_fits(change, texts, folder, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(cosmopedia, "BATCH", 10_000)
    source = write_jsonl(tmp_path / "a.jsonl", texts)
    killed_at_rename(5, lambda: prepare(source, folder))
    with open(folder / "train.bin.tmp", "ab") as file:
        file.write(b"written, but not noted")
    limit = 100 if change == "fewer" else None
    if change == "other texts":
        texts = ["another beginning", *texts[1:]]
    if change == "lost tokens":
        os.truncate(folder / "train.bin.tmp", 10)
    if change == "older program":
        (folder / "progress.json.tmp").write_text("{}")
    source = write_jsonl(tmp_path / "b.jsonl", texts)  # the same texts in another file would do
    capsys.readouterr()
    prepare(source, folder, limit)
    assert ("going on after" in capsys.readouterr().out) == (change == "none")
    (tmp_path / "whole").mkdir()
    prepare(source, tmp_path / "whole", limit)
    assert {name: file for name, file in content(folder).items() if name[0] != "."} == content(tmp_path / "whole")


def test_one_at_a_time(texts, folder, tmp_path):
    source = write_jsonl(tmp_path / "a.jsonl", texts)
    with open(folder / "lock.tmp", "a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(BadInput, match="is being prepared by another process; wait for it or stop it"):
            prepare(source, folder)
    prepare(source, folder)


def test_the_old_data_set_stays_until_the_new_one_is_whole(texts, folder, tmp_path, monkeypatch):
    monkeypatch.setattr(cosmopedia, "BATCH", 10_000)
    prepare(write_jsonl(tmp_path / "a.jsonl", texts[:300]), folder)
    before = content(folder)
    killed_at_rename(4, lambda: prepare(write_jsonl(tmp_path / "a.jsonl", texts), folder))
    assert before.items() <= content(folder).items()


# -- the script -------------------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def clone(tmp_path_factory, vocab_bpe):
    clone = copy_repository(tmp_path_factory.mktemp("clone"))
    (clone / "data" / "cosmopedia" / "vocab.bpe").write_bytes(vocab_bpe)
    return clone


def test_as_a_script_and_as_a_module(clone, texts, tmp_path):
    write_parquet(tmp_path / "a.parquet", texts)
    done = run(tmp_path, clone / "data" / "cosmopedia" / "prepare.py", "--source=a.parquet")
    assert done.returncode == 0 and done.stderr == "", done
    assert done.stdout.startswith("wrote data/cosmopedia in ") and done.stdout.endswith("left out: 2 empty, 1 no text, 0 of a megabyte or more\n")
    first = content(clone / "data" / "cosmopedia")
    done = run(clone, "-m", "data.cosmopedia.prepare", "--source", tmp_path / "a.parquet", "--limit", 2000)
    assert done.returncode == 0, done
    second = content(clone / "data" / "cosmopedia")
    assert [name for name in first if first[name] != second[name]] == ["meta.json"]


def test_a_bad_source_is_one_line(clone, tmp_path):
    before = content(clone)
    line = one_line(run(clone, "data/cosmopedia/prepare.py", "--source", tmp_path / "none"))
    assert line == f"prepare.py: --source {tmp_path}/none does not exist; give a .parquet or .jsonl file, or a folder of them"
    assert {n for n in content(clone) if "__pycache__" not in n} == {n for n in before if "__pycache__" not in n}


def test_the_hub_by_its_library(clone, texts, tmp_path):
    """The real library, with a folder for the hub's data set."""
    (tmp_path / "hub").mkdir()
    write_parquet(tmp_path / "hub" / "train-00000-of-00001.parquet", texts)
    script = clone / "data" / "cosmopedia" / "prepare.py"
    code = f"import data.cosmopedia.prepare as p; p.HUB = {str(tmp_path / 'hub')!r}; p.main()"
    done = run(clone, "-c", code, env={"HF_HOME": str(tmp_path / "cache"), "HF_HUB_OFFLINE": "1"})
    assert done.returncode == 0, done
    meta = json.loads((script.parent / "meta.json").read_text())
    assert meta["train_documents"] + meta["val_documents"] == len(kept(texts)) and meta["non_string_documents"] == 1
    folder = tmp_path / "cosmopedia"
    folder.mkdir()
    by_file = prepare(tmp_path / "hub", folder)
    assert {k for k in meta if meta[k] != by_file[k]} == {"source", "source_sha256"} and meta["source_sha256"] == meta["documents_sha256"]
    assert content(folder)["train.bin"] == (script.parent / "train.bin").read_bytes()


@pytest.mark.parametrize("habit, message", [
    ("not installed", "comes through the library datasets: pip install datasets, or give its files: python data/cosmopedia/prepare.py --source"),
    ("unreachable", "cannot get HuggingFaceTB/cosmopedia-100k .ConnectionError: no route.; try again with a network, or give its files"),
    ("no text", "has no column `text`; has prompt")])
def test_training_asks_the_hub(habit, message, monkeypatch):
    """train.py calls main() without arguments, whatever its own are."""
    def load(*args, **kwargs):
        if habit == "unreachable":
            raise ConnectionError("no route")
        return types.SimpleNamespace(column_names=["prompt"])
    monkeypatch.setitem(sys.modules, "datasets", None if habit == "not installed" else types.SimpleNamespace(load_dataset=load))
    monkeypatch.setattr(sys, "argv", ["train.py", "--dataset=cosmopedia", "--source=x"])
    with pytest.raises(BadInput, match=message):
        dataset.prepare(ROOT / "data" / "cosmopedia")


def damaged(path, texts, how):
    write_parquet(path, texts)
    whole = path.read_bytes()
    path.write_bytes(how(whole))


@pytest.mark.parametrize("arguments, message", [
    ("--source=none", "--source none does not exist; give"),
    ("--source=a.txt", "--source a.txt is no .parquet or .jsonl file, nor a folder with one"),
    ("--source=nothing", "--source nothing is no .parquet"),
    ("--source=prompts.parquet", "prompts.parquet has no column `text`; has prompt, audience"),
    ("--source=prompts.jsonl", "prompts.jsonl has no column `text`; has prompt, audience"),
    ("--source=mixed", "mixed/b.jsonl has no column `text`"),
    ("--source=cut.parquet", "cannot read cut.parquet: .*; give a whole .parquet file"),
    ("--source=empty.parquet", "cannot read empty.parquet: "),
    ("--source=pointer.parquet", "cannot read pointer.parquet: "),
    ("--source=array.jsonl", "cannot read array.jsonl, line 1: no JSON object"),
    ("--source=broken.jsonl", "cannot read broken.jsonl, line 1: "),
    ("--source=latin.jsonl", "cannot read latin.jsonl, line 1: .*utf-8"),
    ("--source=empty.jsonl", "empty.jsonl is too short: of its 0 rows"),
    ("--source=a.jsonl --limit=0", "--limit=0: give 1 or more"),
    ("--source=a.jsonl --limit=few", "--limit: invalid int value: 'few'"),
    ("--source=a.jsonl --limt=3", "unrecognized arguments: --limt=3"),
    ("--source", "--source: expected one argument")])
def test_bad_sources(arguments, message, texts, folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("nothing", "mixed"):
        (tmp_path / name).mkdir()
    for name in ("a.txt", "empty.parquet", "empty.jsonl"):
        (tmp_path / name).write_text("")
    write_jsonl(tmp_path / "mixed" / "a.jsonl", texts[:10])
    pyarrow.parquet.write_table(pyarrow.table({"prompt": ["x"], "audience": ["y"]}), "prompts.parquet")
    for name, line in (("prompts", b'{"prompt": "x", "audience": "y"}'), ("mixed/b", b'{"prompt": "x"}'), ("array", b'["text"]'),
                       ("broken", b'{"text": '), ("latin", b'{"text": "caf\xe9"}')):
        (tmp_path / f"{name}.jsonl").write_bytes(line)
    damaged(tmp_path / "cut.parquet", texts, lambda whole: whole[:len(whole) // 2])
    (tmp_path / "pointer.parquet").write_text("version https://git-lfs.github.com/spec/v1\n")
    write_jsonl(tmp_path / "a.jsonl", texts[:10])
    monkeypatch.setattr(cosmopedia, "__file__", str(folder / "prepare.py"))
    with pytest.raises(BadInput, match=message):
        cosmopedia.main(arguments.split())
    assert {p.name for p in folder.iterdir()} <= {"lock.tmp"}


def test_damage_in_the_middle(texts, folder, tmp_path):
    """Found late: no data set is left, and the mended file goes on."""
    source = write_jsonl(tmp_path / "a.jsonl", texts)
    whole = source.read_text()
    source.write_text(whole[:-50])
    with pytest.raises(BadInput, match=f"a.jsonl, line {len(texts)}: "):
        prepare(source, folder)
    damaged(tmp_path / "a.parquet", texts, lambda whole: whole[:2000] + bytes(3000) + whole[5000:])
    with pytest.raises(BadInput, match="cannot read .*a.parquet: .*; give a whole .parquet file"):
        prepare(tmp_path / "a.parquet", folder)
    assert not (folder / "meta.json").exists()
    source.write_text(whole)
    prepare(source, folder)


def test_full_disk(clone, texts, tmp_path):
    """No file may grow beyond 1000 bytes: stands for a disk without space."""
    write_jsonl(tmp_path / "a.jsonl", texts)
    (clone / "data" / "cosmopedia" / "meta.json").unlink(missing_ok=True)
    code = ("import resource, runpy, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000)); "
            "sys.dont_write_bytecode = True; runpy.run_module('data.cosmopedia.prepare', run_name='__main__')")
    line = one_line(run(clone, "-c", code, "--source", tmp_path / "a.jsonl"))
    assert line == "prepare.py: cannot write data/cosmopedia: File too large; check the free space and the permissions"
    assert not (clone / "data" / "cosmopedia" / "meta.json").exists()
