"""data/books on made-up archives: which books, whose are held out, what becomes of a text, hostile
archives; and the real one where it is at hand."""
import contextlib
import hashlib
import io
import json
import os
import tarfile

import numpy as np
import pytest
import torch

from base.errors import BadInput
from config import Options
from data import files, load_dataset
from data.books import prepare as books
from data.books_bpe import prepare as books_bpe
from data.tokenizer import ByteTokenizer, gpt2_tokenizer, load_tokenizer
from tools.score import measured
from training.evaluation import evaluate
from training.machine import Machine
from training.parallel import World

TOP = "classic-books-markdown-1234"
# of these names the hash puts the first two into val, the next two into test, the rest into train
AUTHORS = ["Lewis Carroll", "Frank Norris", "Wilkie Collins", "Elizabeth Gaskell", "Émile Zola",
           "Karl Marx & Friedrich Engels", "Various"]
REAL = os.environ.get("NANOMIX_BOOKS", "")


def book(author, title, year, text="It was the best of times.\n"):
    return (f"# Title: {title}\n\n## Author: {author}\n\n## Year: {year}\n\n-------\n\n{text}")


def repository():
    """path -> bytes, as in the repository: books to take, and others."""
    found = {}
    for i, author in enumerate(AUTHORS):
        for title in ("One", "Two "):
            text = book(author, title, 1837 + i, f"{author} wrote {title}.\r\n\r\n\r\n\r\nOnce. \n")
            found[f"{author}/{title}.md"] = text.encode()
    found["Jane Austen/Emma.md"] = book("Jane Austen", "Emma", 1815).encode()
    found["Emile Zola/Late.md"] = book("Emile Zola", "Late", 1902).encode()
    found["William Shakespeare/Hamlet.md"] = book("William Shakespeare", "Hamlet", 1850).encode()
    found["No One/None.md"] = b"no header"
    return found


TAKEN = {path: content for path, content in repository().items()
         if path.split("/")[0] in AUTHORS}


def sha256(contents):
    whole = b"".join(contents[path] for path in sorted(contents, key=str.encode))
    return hashlib.sha256(whole).hexdigest()


def member(name, content=b"", **fields):
    info = tarfile.TarInfo(name)
    info.size = len(content)
    for field, value in fields.items():
        setattr(info, field, value)
    return info, io.BytesIO(content)


def archive(path, contents, extra=()):
    """A tar of path -> bytes in GitHub's layout, packed as the name says; extra: members."""
    with tarfile.open(path, f"w:{path.suffix[1:]}") as tar:
        tar.addfile(*member(TOP, type=tarfile.DIRTYPE))
        tar.addfile(*member(f"{TOP}/README.md", b"read me"))
        for name, content in contents.items():
            tar.addfile(*member(f"{TOP}/{name}", content))
        for info, content in extra:
            tar.addfile(info, content)
    return path


@pytest.fixture
def data(tmp_path, monkeypatch):
    """A data/ of its own; the made-up books are the expected ones."""
    folder = tmp_path / "data"
    (folder / "books").mkdir(parents=True)
    (folder / "books" / "prepare.py").touch()
    for module in (files, books):
        monkeypatch.setattr(module, "DATA", folder)
    monkeypatch.setattr("data.dataset.DATA", folder)
    monkeypatch.setattr("base.files.ROOT", tmp_path)
    monkeypatch.setattr(books, "SHA256", sha256(TAKEN))
    return folder


def prepare(source, *options):
    books.main([f"--source={source}", "--tokenizer=bytes", *options])


def binaries(folder):
    return {path.name: path.read_bytes() for path in folder.glob("*.bin")}


# -- what is taken ---------------------------------------------------------------------------------

def test_archives_and_folders_are_the_same_set(data, tmp_path):
    prepare(archive(tmp_path / "a.gz", repository()))
    first = binaries(data / "books")
    assert first.keys() == {"train.bin", "val.bin", "test.bin"}
    backwards = dict(reversed(repository().items()))
    root = tmp_path / "folder"
    for name, content in repository().items():
        path = root / TOP / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    for source in (archive(tmp_path / "a.xz", backwards), root, root / TOP):
        prepare(source)
        assert binaries(data / "books") == first


def test_whole_authors_are_held_out(data, tmp_path):
    prepare(archive(tmp_path / "a.gz", repository()))
    meta = json.loads((data / "books" / "meta.json").read_text())
    authors = {}
    for split in ("train", "val", "test"):
        documents = meta[f"{split}_documents"]
        authors[split] = sorted({document["author"] for document in documents})
        ids = np.fromfile(data / "books" / f"{split}.bin", "<u2")
        assert len(ids) == meta[f"{split}_tokens"] == sum(d["tokens"] for d in documents)
        assert meta[f"{split}_bytes"] == sum(d["bytes"] for d in documents)
        pieces = bytes(ids.astype(np.uint8)).split(b"\0")  # a zero byte ends a document
        assert pieces.pop() == b"" and len(pieces) == len(documents)
        for piece, document in zip(pieces, documents):
            text = f"{document['author']} wrote {document['title']}"
            assert piece.decode().startswith(text) and len(piece) == document["bytes"]
    assert authors == {"val": sorted(AUTHORS[:2]), "test": sorted(AUTHORS[2:4]),
                       "train": sorted(AUTHORS[4:])}
    loaded = load_dataset("books", 16)
    assert len(loaded.val) == meta["val_tokens"]
    assert loaded.bytes_per_token == meta["val_bytes"] / meta["val_tokens"]


def test_the_test_split_is_evaluated_when_asked_for(data, tmp_path, monkeypatch):
    prepare(archive(tmp_path / "a.gz", repository()))
    loaded = load_dataset("books", 16)
    test = np.fromfile(data / "books" / "test.bin", "<u2")
    rows = [y.flatten() for x, y, _ in loaded.eval_batches("test", 16, 4)]
    assert torch.cat(rows).tolist() == test[1:].tolist()
    options = Options(dataset="books", block_size=16)

    class Guess(torch.nn.Module):
        def loss(self, x, y):
            return torch.tensor(2.0)

    machine = Machine(torch.device("cpu"), contextlib.nullcontext(), World())
    for split in ("val", "test"):
        result = evaluate(Guess(), loaded, options, machine, split)
        meta = loaded.meta
        per_byte = meta[f"{split}_tokens"] / meta[f"{split}_bytes"]
        assert result.loss == 2 and result.bpb == pytest.approx(2 / np.log(2) * per_byte)


@pytest.mark.parametrize("most", [2**20, 24])
def test_losses_are_kept_by_author(most, data, tmp_path):
    prepare(archive(tmp_path / "a.gz", repository()))
    loaded = load_dataset("books", 8)
    table = torch.randn(256, 257, generator=torch.Generator().manual_seed(1))
    options = Options(dataset="books", block_size=8, eval_tokens=most)
    of = measured(loaded, options, lambda x: table[x])
    owner = []  # of each token
    for document in loaded.meta["val_documents"]:
        owner += [document["author"]] * document["tokens"]
    full = (len(loaded.val) - 1) // 8
    take = min(full, most // 8)
    expected = {}
    for number in range(take):
        at = number * full // take * 8
        tokens = torch.tensor(loaded.val[at:at + 9].astype(int))
        loss = torch.nn.functional.cross_entropy(table[tokens[:-1]], tokens[1:]).item()
        expected.setdefault(owner[at + 4], []).append(loss)
    assert of["authors"] == list(expected) and len(expected) == 2
    assert of["by_block"] == pytest.approx([np.mean(losses) for losses in expected.values()])


def test_documents_that_do_not_add_up_are_refused(data, tmp_path):
    prepare(archive(tmp_path / "a.gz", repository()))
    path = data / "books" / "meta.json"
    meta = json.loads(path.read_text())
    meta["val_documents"][0]["tokens"] += 1
    path.write_text(json.dumps(meta))
    with pytest.raises(BadInput, match="val_documents have .* prepare it again"):
        load_dataset("books", 8).val_authors([0])


def test_one_author_in_any_spelling_is_in_one_split():
    for one, other in (("Émile Zola", "EMILE  ZOLA"), ("H.G. Wells", "H. G. Wells"),
                       ("Sören Kierkegaard", "So\u0308ren Kierkegaard")):
        assert books.split_of(one) == books.split_of(other)
        assert books.normalised_name(one).replace(" ", "").isalpha()
    many = [books.split_of(f"Author {i}") for i in range(4000)]
    for split in ("val", "test"):
        assert 150 < many.count(split) < 250  # one in 20


def test_headers_go_and_texts_are_normalised():
    odd = ("\ufeff\n\nCafe\u0301 -------\t \r\n\r\n\r\n\r\n  two\x85  spaces\x00 \n# Title: not a "
           "header\n-------\n\n\n")
    found = books.book_of("An Author/A Title .md", book("An Author", "A", 1840, odd).encode())
    assert found == ("An Author", "A Title", 1840,
                     "Café -------\n\n  two  spaces\n# Title: not a header\n-------\n")


def test_other_tokenizers(data, tmp_path, monkeypatch):
    monkeypatch.setattr("data.named_tokenizer.gpt2",
                        lambda folder: gpt2_tokenizer("#version: 0.2\nt h\n"))
    source = archive(tmp_path / "a.gz", repository())
    books.main([f"--source={source}"])
    prepare(source, "--tokenizer=bpe", "--vocab_size=270", "--name=books_small")
    spelled = {}
    for name, end in (("books", 257), ("books_small", 0)):
        ids = np.fromfile(data / name / "val.bin", "<u2")
        tokenizer = load_tokenizer(data / name / "tokenizer.json")
        assert (ids == end).sum() == 4
        spelled[name] = tokenizer.decode(ids.tolist())
    assert spelled["books"] == spelled["books_small"]
    with pytest.raises(BadInput, match="goes with --tokenizer=bpe"):
        prepare(source, "--vocab_size=300")
    for name in ("mine", "books/x", "books_", "../books"):
        with pytest.raises(BadInput, match="name"):
            prepare(source, f"--name={name}")


def test_in_tokens_of_their_own(data, tmp_path):
    books_bpe.main([f"--source={archive(tmp_path / 'a.gz', repository())}", "--vocab_size=270"])
    assert load_dataset("books_bpe", 8).vocab_size == 270
    assert {path.name for path in (data / "books").iterdir()} == {"prepare.py"}


def test_from_github(data, tmp_path, monkeypatch):
    source = archive(tmp_path / "a.gz", repository())
    monkeypatch.setattr(books, "URL", source.as_uri())
    books.main(["--tokenizer=bytes"])
    kept = data / "books" / "archive.tar.gz"
    assert kept.read_bytes() == source.read_bytes()
    first = binaries(data / "books")
    source.unlink()
    books.main(["--tokenizer=bytes"])  # the kept one
    assert binaries(data / "books") == first
    kept.unlink()
    with pytest.raises(BadInput, match="cannot fetch file:.*--source PATH"):
        books.main(["--tokenizer=bytes"])
    assert not list((data / "books").glob("*.tmp"))


def test_a_download_that_is_too_large(data, tmp_path, monkeypatch):
    source = archive(tmp_path / "a.gz", repository())
    monkeypatch.setattr(books, "URL", source.as_uri())
    monkeypatch.setattr(books, "ARCHIVE_BYTES", 100)
    with pytest.raises(BadInput, match="more than 100 bytes"):
        books.main(["--tokenizer=bytes"])
    assert {path.name for path in (data / "books").iterdir()} == {"prepare.py"}


# -- what is refused -------------------------------------------------------------------------------

@pytest.mark.parametrize("name, fields, naming", [
    ("../a/b.md", {}, "outside its folder"),
    ("/etc/x/b.md", {}, "outside its folder"),
    (f"{TOP}/../../b.md", {}, "outside its folder"),
    (f"{TOP}/a/./b.md", {}, "outside its folder"),
    ("other/a/b.md", {}, "outside its folder"),
    (f"{TOP}/a/b.md", dict(type=tarfile.SYMTYPE, linkname="/etc/passwd"), "is a link"),
    (f"{TOP}/a/b.md", dict(type=tarfile.LNKTYPE, linkname=f"{TOP}/README.md"), "is a link"),
    (f"{TOP}/a/b.md", dict(type=tarfile.FIFOTYPE), "no plain file"),
    (f"{TOP}/a/b.md", dict(type=tarfile.CHRTYPE), "no plain file"),
    (f"{TOP}/a/\x1b[31m\n.md", dict(type=tarfile.SYMTYPE, linkname="x"), r"\x1b[31m\n"),
])
def test_members_that_must_not_be(name, fields, naming, data, tmp_path):
    extra = [member(name, b"" if fields else b"x", **fields)]
    path = archive(tmp_path / "a.gz", repository(), extra)
    with pytest.raises(BadInput) as error:
        prepare(path)
    assert naming in str(error.value) and "\n" not in str(error.value)
    assert {path.name for path in (data / "books").iterdir()} == {"prepare.py"}


@pytest.mark.parametrize("limit, value, naming", [
    ("MEMBERS", 5, "more than 5 members"),
    ("BOOK_BYTES", 2**20, r"big.md' of 3,145,728 bytes, and at most 1,048,576"),
    ("ARCHIVE_BYTES", 2**20, "more than 1,048,576 bytes, unpacked"),
])
def test_archives_that_unpack_to_too_much(limit, value, naming, tmp_path, monkeypatch):
    path = archive(tmp_path / "a.gz", repository() | {"a/big.md": bytes(3 * 2**20)})
    assert path.stat().st_size < 2**16
    monkeypatch.setattr(books, limit, value)
    with pytest.raises(BadInput, match=naming):
        books.read_books(path)


def test_damaged_archives_are_one_line(tmp_path):
    for kind in ("gz", "xz"):
        whole = archive(tmp_path / f"a.{kind}", repository()).read_bytes()
        bad = tmp_path / f"bad.{kind}"
        for position in range(0, len(whole), max(1, len(whole) // 40)):
            changed = bytearray(whole)
            changed[position] ^= 0xff
            for content in (bytes(changed), whole[:position]):
                bad.write_bytes(content)
                with pytest.raises(BadInput, match="bad"):
                    books.read_books(bad)


def test_other_books_are_refused(data, tmp_path):
    others = repository() | {f"{AUTHORS[0]}/One.md": book(AUTHORS[0], "One", 1850).encode()}
    with pytest.raises(BadInput, match="has 14 such books of .*not the 296 of 151,625,635 bytes"):
        prepare(archive(tmp_path / "a.gz", others))
    with pytest.raises(BadInput, match="does not exist"):
        prepare(tmp_path / "nowhere")
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(BadInput, match="pipe is no regular file"):
        prepare(tmp_path / "pipe")
    (tmp_path / "empty").mkdir()
    with pytest.raises(BadInput, match="has 0 such books"):
        prepare(tmp_path / "empty")


def test_links_in_a_folder_are_not_followed(data, tmp_path):
    root = tmp_path / "folder"
    (root / "A").mkdir(parents=True)
    (root / "A" / "B.md").write_text(book("A", "B", 1850))
    (root / "C").symlink_to(root / "A")
    with pytest.raises(BadInput, match="C/B.md is a link"):
        prepare(root)
    (root / "C").unlink()
    (root / "A" / "D.md").symlink_to("/etc/passwd")
    with pytest.raises(BadInput, match="D.md is a link"):
        prepare(root)


@pytest.mark.slow
@pytest.mark.skipif(not REAL, reason="NANOMIX_BOOKS names no archive")
def test_the_real_ones():
    found = books.read_books(books.Path(REAL))
    assert len(found) == books.FILES and sum(map(len, found.values())) == books.BYTES
    assert len({path.split("/")[0] for path in found}) == 137
    for path, content in found.items():
        text = books.book_of(path, content).text
        assert "## Year:" not in text and "\r" not in text and "\n\n\n" not in text
        assert ByteTokenizer().special_tokens["<|endoftext|>"] not in text.encode()
