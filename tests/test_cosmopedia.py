"""data/cosmopedia on made-up files in the schema of the data set: tokens against a slow reading,
interruptions, bad files, and a hub of our own."""
import fcntl
import hashlib
import json
import multiprocessing
import os
import random
import re
import signal

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from conftest import content, copy_repository, metrics, one_line, run
from hub import Hub

from base.errors import BadInput
from data import dataset, load_dataset
from data.cosmopedia import prepare as cosmopedia
from data.tokenizer import gpt2_tokenizer

END = 50256
ODD = ["", None, "  \n ", "née 漢字 🙂", "said <|endoftext|> and went on", " leading",
       "trailing \n\n", "a" * 3000, "tab\there\r\n", "\0", "\x1c."]


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
    return [{"prompt": f"Write about {i}.", "text_token_length": i, "text": text,
             "seed_data": "web_samples_v1", "format": "textbook", "audience": "young_children"}
            for i, text in enumerate(texts)]


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
        parts = np.split(ids, np.flatnonzero(ids == END) + 1)[:-1]
        found[split] = [tokenizer.decode(part[:-1].tolist()) for part in parts]
    return found


def kept(texts):
    return [text for text in texts if isinstance(text, str) and text.strip()]


def for_validation(text):
    return int(hashlib.sha256(text.encode()).hexdigest()[:16], 16) / 2**64 < 0.005


def killed_at_rename(number, work):
    """Run work() in a process that is killed where it would rename a file the number-th time."""
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


# -- tokens ---------------------------------------------------------------------------------------

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
    expected = [text for text in kept(texts) if not for_validation(text)]
    assert documents(folder, tokenizer)["train"] == expected
    assert (meta["vocab_size"], meta["dtype"], meta["tokenizer"]) == (50257, "uint16", "gpt2")
    assert meta["limit"] is None
    assert (meta["empty_documents"], meta["non_string_documents"]) == (2, 1)
    assert meta["huge_documents"] == 0
    assert meta["source"] == str(source) and meta["made_by"] == "data/cosmopedia/prepare.py"
    all_bytes = b"".join(file.read_bytes() for file in files)
    assert meta["source_sha256"] == hashlib.sha256(all_bytes).hexdigest()
    assert set(content(folder)) == {"train.bin", "val.bin", "tokenizer.json", "meta.json"}


def test_training_reads_it(texts, tokenizer, folder, tmp_path, monkeypatch):
    monkeypatch.setattr(dataset, "DATA", tmp_path)
    meta = prepare(write_parquet(tmp_path / "a.parquet", texts), folder)
    loaded = load_dataset("cosmopedia", 32)
    assert len(loaded.train) == meta["train_tokens"]
    assert loaded.batch(1, 2, 4, 32)[0].shape == (4, 32)
    assert tokenizer.decode(loaded.val.tolist()) == loaded.tokenizer.decode(loaded.val.tolist())


def test_the_split_depends_on_the_text_alone(texts, tokenizer, folder, tmp_path):
    prepare(write_jsonl(tmp_path / "a.jsonl", texts), folder)
    first = documents(folder, tokenizer)
    shuffled = random.Random(2).sample(texts, len(texts))
    prepare(write_jsonl(tmp_path / "a.jsonl", shuffled), folder)
    second = documents(folder, tokenizer)
    for split in ("train", "val"):
        assert sorted(first[split]) == sorted(second[split])
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
    values = ["one", 3, 4.5, True, ["a"], {"b": 1}, None, "", "two \ud83d.", "two", "x" * 2**20]
    rows = [{"text": value} for value in values] + [{"prompt": "none"}]
    (tmp_path / "a.jsonl").write_text("\n" + "\n\n".join(map(json.dumps, rows)))
    meta = prepare(tmp_path / "a.jsonl", folder)
    assert (meta["empty_documents"], meta["non_string_documents"]) == (1, 7)
    assert meta["huge_documents"] == 1
    found = documents(folder, tokenizer)
    assert sorted(found["train"] + found["val"]) == ["one", "two", "two \ufffd.", "x" * 2**20]

    pyarrow.parquet.write_table(pyarrow.table({"text": [1, 2, 3]}), tmp_path / "a.parquet")
    message = "a.parquet is too short: of its 3 rows 0 have text .left out: 0 empty, 3 no text"
    with pytest.raises(BadInput, match=message):
        prepare(tmp_path / "a.parquet", folder)
    assert not list(folder.glob("*.bin.tmp"))
    assert tokens(folder)["val"].size  # the earlier one is as it was


def test_a_huge_document(tokenizer, folder, tmp_path):
    huge = "A sentence of a long document, number 3. " * 60_000
    meta = prepare(write_parquet(tmp_path / "a.parquet", ["before", huge, "after"], 1), folder)
    found = documents(folder, tokenizer)
    assert sorted(found["train"] + found["val"]) == [huge, "after", "before"]
    assert meta["huge_documents"] == 1


def test_limit(texts, tokenizer, folder, tmp_path):
    for write, name in ((write_parquet, "a.parquet"), (write_jsonl, "a.jsonl")):
        meta = prepare(write(tmp_path / name, texts), folder, limit=45)
        found = documents(folder, tokenizer)
        assert sorted(found["train"] + found["val"]) == sorted(kept(texts[:45]))
        assert meta["limit"] == 45

    def sha256(text):
        return hashlib.sha256(text.encode()).hexdigest()

    assert found["val"] == [min(kept(texts[:45]), key=sha256)]  # none is below 0.5 %: the lowest


# -- interruptions --------------------------------------------------------------------------------

@pytest.mark.parametrize("number", [1, 2, 9, -5, -4, -3, -2, -1])
def test_a_killed_preparation_goes_on(number, texts, folder, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(cosmopedia, "BATCH", 10_000)
    source = write_parquet(tmp_path / "a.parquet", texts)
    whole = tmp_path / "whole"
    whole.mkdir()
    renames = []

    def replace(source, target, rename=os.replace):
        renames.append(target)
        rename(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", replace)
        prepare(source, whole)
    assert len(renames) > 14
    stop = number if number > 0 else len(renames) + 1 + number
    assert killed_at_rename(stop, lambda: prepare(source, folder)) == -signal.SIGKILL
    assert not (folder / "meta.json").exists()
    capsys.readouterr()
    prepare(source, folder)
    went_on = "going on after" in capsys.readouterr().out
    # with something saved, and not yet moved into place
    assert went_on == (1 < stop <= len(renames) - 3)
    assert content(folder) == content(whole)  # and no left-overs


@pytest.mark.parametrize("change", ["other texts", "fewer", "lost tokens", "older program",
                                    "no JSON", "nonsense", "none"])
def test_what_was_begun_is_taken_up_only_if_it_fits(change, texts, folder, tmp_path, monkeypatch,
                                                    capsys):
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
    if change == "no JSON":
        (folder / "progress.json.tmp").write_text("{" * 10**5)
    if change == "nonsense":
        path = folder / "progress.json.tmp"
        path.write_text(json.dumps({**json.loads(path.read_text()), "rows": -1}))
    source = write_jsonl(tmp_path / "b.jsonl", texts)  # the same texts in another file would do
    capsys.readouterr()
    prepare(source, folder, limit)
    assert ("going on after" in capsys.readouterr().out) == (change == "none")
    (tmp_path / "whole").mkdir()
    prepare(source, tmp_path / "whole", limit)
    assert content(folder) == content(tmp_path / "whole")


@pytest.mark.parametrize("going_on", [False, True])
@pytest.mark.parametrize("name", ["train.bin.tmp", "val.bin.tmp", "progress.json.tmp"])
@pytest.mark.parametrize("kind", ["link", "hard link", "pipe"])
def test_nothing_is_written_through_a_link(kind, name, going_on, texts, folder, tmp_path,
                                           monkeypatch):
    """In a folder that somebody gave us; even if the rest of it is a preparation to go on with."""
    monkeypatch.setattr(cosmopedia, "BATCH", 10_000)
    source = write_jsonl(tmp_path / "a.jsonl", texts)
    path, theirs = folder / name, tmp_path / "theirs"
    if going_on:
        killed_at_rename(5, lambda: prepare(source, folder))
        theirs.write_bytes(path.read_bytes() + b"and more of theirs")
        path.unlink()
    else:
        theirs.write_bytes(b"theirs")
    before = theirs.read_bytes()
    if kind == "link":
        path.symlink_to(theirs)
    elif kind == "hard link":
        path.hardlink_to(theirs)
    else:
        os.mkfifo(path)
    prepare(source, folder)
    assert theirs.read_bytes() == before
    (tmp_path / "whole").mkdir()
    prepare(source, tmp_path / "whole")
    assert content(folder) == content(tmp_path / "whole")


def test_one_at_a_time(texts, folder, tmp_path):
    source = write_jsonl(tmp_path / "a.jsonl", texts)
    with open(tmp_path / ".cosmopedia.lock", "a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        message = "is being prepared by another process; wait for it or stop it"
        with pytest.raises(BadInput, match=message):
            prepare(source, folder)
    prepare(source, folder)


def test_the_old_data_set_stays_until_the_new_one_is_whole(texts, folder, tmp_path, monkeypatch):
    monkeypatch.setattr(cosmopedia, "BATCH", 10_000)
    prepare(write_jsonl(tmp_path / "a.jsonl", texts[:300]), folder)
    before = content(folder)
    killed_at_rename(4, lambda: prepare(write_jsonl(tmp_path / "a.jsonl", texts), folder))
    assert before.items() <= content(folder).items()


# -- the script -----------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def clone(tmp_path_factory, vocab_bpe):
    clone = copy_repository(tmp_path_factory.mktemp("clone"))
    (clone / "data" / "cosmopedia" / "vocab.bpe").write_bytes(vocab_bpe)
    return clone


def test_as_a_script_and_as_a_module(clone, texts, tmp_path):
    write_parquet(tmp_path / "a.parquet", texts)
    done = run(tmp_path, clone / "data" / "cosmopedia" / "prepare.py", "--source=a.parquet")
    assert done.returncode == 0 and done.stderr == "", done
    assert done.stdout.startswith("wrote data/cosmopedia in ")
    assert done.stdout.endswith("left out: 2 empty, 1 no text, 0 of a megabyte or more\n")
    first = content(clone / "data" / "cosmopedia")
    done = run(clone, "-m", "data.cosmopedia.prepare", "--source", tmp_path / "a.parquet",
               "--limit", 2000)
    assert done.returncode == 0, done
    second = content(clone / "data" / "cosmopedia")
    assert [name for name in first if first[name] != second[name]] == ["meta.json"]


def test_a_bad_source_is_one_line(clone, tmp_path):
    before = content(clone)
    line = one_line(run(clone, "data/cosmopedia/prepare.py", "--source", tmp_path / "none"))
    assert line == (f"prepare.py: --source {tmp_path}/none does not exist; give a .parquet or "
                    ".jsonl file, or a folder of them")
    new = set(content(clone)) - set(before)
    assert not [name for name in new if "__pycache__" not in name]


# -- the hub --------------------------------------------------------------------------------------

def parquet(texts):
    """A .parquet file, bytes."""
    rows = rows_of(texts)
    file = pyarrow.BufferOutputStream()
    table = pyarrow.table({key: [row[key] for row in rows] for key in rows[0]})
    pyarrow.parquet.write_table(table, file, row_group_size=100)
    return file.getvalue().to_pybytes()


FIRST, SECOND = "data/train-00000-of-00002.parquet", "data/train-00001-of-00002.parquet"


@pytest.fixture
def hub(texts):
    """In the layout of cosmopedia-100k."""
    files = {"README.md": b"---\nlicense: apache-2.0\n---\n# Cosmopedia\n", ".gitattributes": b"",
             FIRST: parquet(texts[:800]), SECOND: parquet(texts[800:])}
    with Hub(cosmopedia.HUB, files) as hub:
        yield hub


@pytest.fixture
def fresh(clone):
    """The clone without a prepared data set."""
    folder = clone / "data" / "cosmopedia"
    for path in [*folder.glob("*.bin"), *folder.glob("*.json"), *folder.glob("*.tmp")]:
        path.unlink()
    return clone


def prepare_from(hub, clone, cache, *arguments):
    """The command as a process that asks our hub."""
    return run(clone, "data/cosmopedia/prepare.py", *arguments, env=hub.environment(cache))


def test_from_the_hub(hub, fresh, texts, tmp_path):
    done = prepare_from(hub, fresh, tmp_path / "cache")
    assert done.returncode == 0 and done.stderr == "", done
    from_hub = fresh / "data" / "cosmopedia"
    meta = json.loads((from_hub / "meta.json").read_text())
    assert meta["source"] == cosmopedia.HUB and meta["source_sha256"] == meta["documents_sha256"]
    assert meta["train_documents"] + meta["val_documents"] == len(kept(texts))

    (tmp_path / "files").mkdir()
    for name in (FIRST, SECOND):
        (tmp_path / "files" / name.split("/")[1]).write_bytes(hub.files[name])
    (tmp_path / "by_file").mkdir()
    by_file = prepare(tmp_path / "files", tmp_path / "by_file")
    different = {key for key in meta if meta[key] != by_file[key]}
    assert different == {"source", "source_sha256"}
    for name in ("train.bin", "val.bin", "tokenizer.json"):
        assert (from_hub / name).read_bytes() == (tmp_path / "by_file" / name).read_bytes()

    # each file once, and from the cache when the data set is prepared again
    fetched = [path.removeprefix(f"/resolve/{hub.commit}/") for method, path, _ in hub.asked
               if method == "GET" and path.endswith("parquet")]
    assert fetched == [FIRST, SECOND]
    hub.asked.clear()
    assert prepare_from(hub, fresh, tmp_path / "cache").returncode == 0
    assert not [path for method, path, _ in hub.asked if method == "GET" and "parquet" in path]


def test_a_limit_streams(hub, fresh, texts, tmp_path):
    """And so it asks for the first file alone."""
    done = prepare_from(hub, fresh, tmp_path / "cache", "--limit=50")
    assert done.returncode == 0 and done.stderr == "", done
    meta = json.loads((fresh / "data" / "cosmopedia" / "meta.json").read_text())
    assert meta["limit"] == 50
    assert meta["train_documents"] + meta["val_documents"] == len(kept(texts[:50]))
    asked = [(path, wanted) for _, path, wanted in hub.asked if path.endswith("parquet")]
    assert asked and all(path.endswith(FIRST) and wanted for path, wanted in asked)


def refused_by(hub, clone, cache, *arguments):
    """The one line with which the command ends."""
    line = one_line(prepare_from(hub, clone, cache, *arguments))
    assert line.startswith(f"prepare.py: cannot get {cosmopedia.HUB} (")
    assert line.endswith("); try again with a network, or give its files: "
                         "python data/cosmopedia/prepare.py --source PATH")
    assert not list((clone / "data" / "cosmopedia").glob("*.bin"))
    return line


SLOW = pytest.mark.slow


@pytest.mark.parametrize("habit, reason", [
    ("no such data set", "404|find"), ("a page instead", "X-Repo-Commit"),
    ("a file is missing", "404"), ("half a file", "arquet"),
    pytest.param("an empty file", "arquet", marks=SLOW),
    pytest.param("no parquet", "arquet", marks=SLOW),
    pytest.param("nobody", "onnect", marks=SLOW)])  # the libraries try again for half a minute
def test_wrong_answers_of_the_hub(habit, reason, hub, fresh, tmp_path):
    page = b"<html><body>Please log in</body></html>"
    if habit == "no such data set":
        hub.bad = {"": (404, b"")}
    elif habit == "a page instead":
        hub.bad = {"": (200, page)}
    elif habit == "a file is missing":
        hub.bad = {SECOND: (404, b"")}
    elif habit == "half a file":
        hub.files[SECOND] = hub.files[SECOND][:5000]
    elif habit == "an empty file":
        hub.files[SECOND] = b""
    elif habit == "no parquet":
        hub.files[SECOND] = page
    else:
        hub.server.shutdown()
        hub.server.server_close()
    assert re.search(reason, refused_by(hub, fresh, tmp_path / "cache"))


@pytest.mark.slow  # likewise
@pytest.mark.parametrize("habit", ["error 500", "no JSON"])
def test_a_hub_that_is_out_of_order(habit, hub, fresh, tmp_path):
    if habit == "error 500":
        hub.bad = {"": (500, b"oops")}
    else:
        hub.bad = {"/data": (200, b"<html>"), f"/tree/{hub.commit}": (200, b"<html>")}
    refused_by(hub, fresh, tmp_path / "cache")


def test_a_data_set_without_texts(hub, fresh, tmp_path):
    file = pyarrow.BufferOutputStream()
    pyarrow.parquet.write_table(pyarrow.table({"prompt": ["x"], "audience": ["y"]}), file)
    hub.files[FIRST] = hub.files[SECOND] = file.getvalue().to_pybytes()
    for arguments in ((), ("--limit=10",)):
        line = one_line(prepare_from(hub, fresh, tmp_path / "cache", *arguments))
        assert f"{cosmopedia.HUB} has no column `text`; has prompt, audience; give its" in line


@pytest.mark.slow
@pytest.mark.parametrize("arguments", [(), ("--limit=1400",)])
def test_a_hub_that_dies_in_the_middle(arguments, hub, fresh, texts, tmp_path):
    """The next start, with the hub back, ends as if nothing had been."""
    hub.breaks_after = 8000
    refused_by(hub, fresh, tmp_path / "cache", *arguments)
    hub.breaks_after = None
    done = prepare_from(hub, fresh, tmp_path / "cache", *arguments)
    assert done.returncode == 0 and done.stderr == "", done
    interrupted = content(fresh / "data" / "cosmopedia")
    done = prepare_from(hub, fresh, tmp_path / "another cache", *arguments)
    assert done.returncode == 0
    assert content(fresh / "data" / "cosmopedia") == interrupted


@pytest.mark.slow
def test_a_new_commit_after_an_interruption_does_not_mix(hub, fresh, texts, tmp_path):
    """What was begun with the old texts is not gone on with."""
    folder = fresh / "data" / "cosmopedia"
    code = ("import os, signal, data.cosmopedia.prepare as p; p.BATCH = 10_000; "
            "p.Progress.save = (lambda save: lambda self: (save(self), self.done.rows > 500 and "
            "os.kill(os.getpid(), signal.SIGKILL)))(p.Progress.save); p.main()")
    killed = run(fresh, "-c", code, env=hub.environment(tmp_path / "cache"))
    assert killed.returncode == -signal.SIGKILL and (folder / "progress.json.tmp").exists()
    went_on = prepare_from(hub, fresh, tmp_path / "cache")
    assert went_on.returncode == 0 and "going on after" in went_on.stdout

    run(fresh, "-c", code, env=hub.environment(tmp_path / "cache"))
    assert (folder / "progress.json.tmp").exists()
    changed = ["a new beginning", *texts[1:800]]
    hub.files[FIRST] = parquet(changed)
    done = prepare_from(hub, fresh, tmp_path / "cache")
    assert done.returncode == 0 and "going on after" not in done.stdout
    digest = hashlib.sha256()
    for text in kept(changed + texts[800:]):
        digest.update(hashlib.sha256(text.encode()).digest())
    meta = json.loads((folder / "meta.json").read_text())
    assert meta["documents_sha256"] == digest.hexdigest()


@pytest.mark.slow
def test_one_command_from_a_fresh_clone(hub, fresh, tmp_path):
    """It fetches, prepares and trains; made short and small by options alone."""
    out_dir = tmp_path / "run"
    done = run(fresh, "train.py", "configs/cosmopedia_lln.py", "--n_layer=1", "--n_head=2",
               "--n_embd=16", "--block_size=32", "--batch_size=4", "--max_iters=4",
               "--gradient_accumulation_steps=1", "--eval_interval=2", "--warmup_iters=1",
               "--eval_tokens=256", "--device=cpu", f"--out_dir={out_dir}", timeout=300,
               env=hub.environment(tmp_path / "cache"))
    assert done.returncode == 0 and done.stderr == "", done
    assert "preparing data/cosmopedia ..." in done.stdout
    assert f"fetching {cosmopedia.HUB}" in done.stdout
    assert metrics(out_dir)[-1]["val_loss"] > 0


# -- bad files ------------------------------------------------------------------------------------

def damaged(path, texts, how):
    write_parquet(path, texts)
    whole = path.read_bytes()
    path.write_bytes(how(whole))


@pytest.mark.parametrize("arguments, message", [
    ("--source=none", "--source none does not exist; give"),
    ("--source=a.txt", "--source a.txt is no .parquet or .jsonl file, nor a folder with one"),
    ("--source=nothing", "--source nothing is no .parquet"),
    ("--source=pipe.jsonl", "--source pipe.jsonl is no .parquet"),
    (f"--source={'x' * 300}.jsonl", "--source x*.jsonl does not exist"),
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
    prompts = pyarrow.table({"prompt": ["x"], "audience": ["y"]})
    pyarrow.parquet.write_table(prompts, "prompts.parquet")
    os.mkfifo("pipe.jsonl")
    for name, line in (("prompts", b'{"prompt": "x", "audience": "y"}'),
                       ("mixed/b", b'{"prompt": "x"}'), ("array", b'["text"]'),
                       ("broken", b'{"text": '), ("latin", b'{"text": "caf\xe9"}')):
        (tmp_path / f"{name}.jsonl").write_bytes(line)
    damaged(tmp_path / "cut.parquet", texts, lambda whole: whole[:len(whole) // 2])
    (tmp_path / "pointer.parquet").write_text("version https://git-lfs.github.com/spec/v1\n")
    write_jsonl(tmp_path / "a.jsonl", texts[:10])
    monkeypatch.setattr(cosmopedia, "__file__", str(folder / "prepare.py"))
    with pytest.raises(BadInput, match=message):
        cosmopedia.main(arguments.split())
    assert not list(folder.iterdir())


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
            "sys.dont_write_bytecode = True; "
            "runpy.run_module('data.cosmopedia.prepare', run_name='__main__')")
    line = one_line(run(clone, "-c", code, "--source", tmp_path / "a.jsonl"))
    assert line == ("prepare.py: cannot write data/cosmopedia: File too large; "
                    "check the free space and the permissions")
    assert not (clone / "data" / "cosmopedia" / "meta.json").exists()
