"""Victorian English: 296 books of 137 authors from 1837 to 1901, by GPT-2's BPE: 32,429,385 tokens
to train on, 1,478,166 to validate, 2,152,760 to test.

    python data/books/prepare.py                  (the archive from GitHub, kept beside this file)
    python data/books/prepare.py --source PATH    (such an archive, .tar.gz or .tar.xz, or a folder
                                                   of Author/Title.md)
    python data/books/prepare.py --tokenizer=smollm2 --name=books_smollm2
                                                  (once more, in a model's tokens)

Some minutes. train.py runs the first by itself when needed. The repository, mlschmitt/
classic-books-markdown, says of no licence: the texts, out of copyright for long, are fetched and
never part of ours.

Whole authors are held out, so that no model is judged on the style of one that it has read: by the
hash of the author's name, one in 20 for validation and one in 20 for test. Each text loses its
header and is normalised (see `normalised`); end-of-text stands behind each.
"""
import gzip
import hashlib
import lzma
import re
import sys
import tarfile
import unicodedata
import zlib
from pathlib import Path
from typing import NamedTuple

# the repository, for `base` and `data`
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from base.errors import BadInput, exit_on_bad_input

import numpy as np

from base.command_line import Parser
from base.files import exists, is_file, read_bytes, shown
from data.files import DATA, SPLITS, check_name, check_ours, locked, write_folder
from data.named_tokenizer import NAMES, add_tokenizer_options, tokenizer_named
from data.sources import download_file
from data.tokenizer import BPETokenizer, end_of_text

COMMIT = "944882722e9a96fa6cf2739dc2ea757e101f412f"
URL = f"https://codeload.github.com/mlschmitt/classic-books-markdown/tar.gz/{COMMIT}"
YEARS = range(1837, 1902)  # Victoria's reign
NOT_THEIRS = "William Shakespeare"  # whose editions of these years are there too
FILES, BYTES = 296, 151_625_635
SHA256 = "79cd900d2e3a97f61e57643ab66d7a39c1d3bb5ddffa209729790fac4ba09cc3"
REMEDY = f"give the archive {URL} or what is in it"

BOOK_BYTES = 2**26     # of the longest book
ARCHIVE_BYTES = 2**30  # of an archive, unpacked
MEMBERS = 100_000
DOWNLOAD_SECONDS = 900

HEADER = re.compile(r"# Title:.*?\n-{3,}\n", re.DOTALL)  # with the author and the year
YEAR = re.compile(r"^## Year: *([0-9]{4}) *$", re.MULTILINE)
SHARE = 2**64 // 20    # of the hashes, for validation, and as many for test


# The files ----------------------------------------------------------------------------------------

class Limited:
    """A stream that is an OSError behind ARCHIVE_BYTES: an archive may unpack to anything."""

    def __init__(self, file):
        self.file = file
        self.left = ARCHIVE_BYTES

    def read(self, n):
        content = self.file.read(min(n, self.left + 1))
        self.left -= len(content)
        if self.left < 0:
            raise OSError(f"more than {ARCHIVE_BYTES:,} bytes, unpacked")
        return content


def files_of_archive(path):
    """(path below the archive's one folder, bytes) of each Author/Title.md in it. BadInput for a
    member elsewhere, a link or anything but files and folders."""
    top = None
    try:
        with open(path, "rb") as file:
            start = file.read(6)
            file.seek(0)
            unpack = {b"\x1f\x8b": gzip.open, b"\xfd7": lzma.open}.get(start[:2], lambda f: f)
            with tarfile.open(fileobj=Limited(unpack(file)), mode="r|") as archive:
                for number, member in enumerate(archive):
                    parts = member.name.rstrip("/").split("/")
                    top = top or parts[0]
                    check_member(path, member, parts, top, number)
                    if member.isreg() and len(parts) == 3 and member.name.endswith(".md"):
                        yield "/".join(parts[1:]), archive.extractfile(member).read()
    except (OSError, tarfile.TarError, EOFError, zlib.error, lzma.LZMAError, ValueError) as error:
        if isinstance(error, BadInput):
            raise
        raise BadInput(f"cannot read {path}: {error}; {REMEDY}") from error


def check_member(path, member, parts, top, number):
    """BadInput if there must be no such member in an archive."""
    name = member.name[:200]
    wrong = None
    if number >= MEMBERS:
        wrong = f"more than {MEMBERS:,} members"
    elif parts[0] != top or {"", ".", ".."} & set(parts):
        wrong = f"{name!r}, which is outside its folder {top[:200]!r}"
    elif not member.isreg() and not member.isdir():
        wrong = f"{name!r}, which is a link or no plain file"
    elif member.size > BOOK_BYTES:
        wrong = f"{name!r} of {member.size:,} bytes, and at most {BOOK_BYTES:,} are read"
    if wrong:
        raise BadInput(f"{path} has {wrong}; {REMEDY}")


def files_of_folder(root):
    """(path, bytes) of each Author/Title.md in a folder, or in that of an unpacked archive in it.
    BadInput for a link."""
    for unpacked in root.glob("classic-books-markdown-*"):
        root = unpacked
    for path in root.glob("*/*.md"):
        if path.is_symlink() or path.parent.is_symlink():
            raise BadInput(f"{path} is a link, which is not followed; {REMEDY}")
        yield f"{path.parent.name}/{path.name}", read_bytes(path, BOOK_BYTES, REMEDY)


def is_ours(path, content):
    """Whether a file of the repository is one of the data set's books."""
    year = YEAR.search(content[:2000].decode(errors="replace").replace("\r\n", "\n"))
    author = path.split("/")[0]
    return year is not None and int(year[1]) in YEARS and author != NOT_THEIRS


def read_books(source):
    """The books, {path: bytes} in the order of the paths' bytes. BadInput if they are not the
    expected ones."""
    if not source.is_dir() and not is_file(source):
        wrong = "is no regular file" if exists(source) else "does not exist"
        raise BadInput(f"--source {source} {wrong}; {REMEDY}")
    files = files_of_folder(source) if source.is_dir() else files_of_archive(source)
    books = {path: content for path, content in files if is_ours(path, content)}
    books = dict(sorted(books.items(), key=lambda item: item[0].encode(errors="surrogateescape")))
    digest = hashlib.sha256()
    for content in books.values():
        digest.update(content)
    n_bytes = sum(map(len, books.values()))
    if digest.hexdigest() != SHA256:
        raise BadInput(f"{source} has {len(books):,} such books of {n_bytes:,} bytes, sha256 "
                       f"{digest.hexdigest()}, not the {FILES} of {BYTES:,} bytes, sha256 "
                       f"{SHA256}; {REMEDY}")
    return books


# Their texts --------------------------------------------------------------------------------------

class Book(NamedTuple):
    author: str
    title: str
    year: int
    text: str


def book_of(path, content):
    author, title = path.removesuffix(".md").split("/")
    text = content.decode(errors="replace").replace("\r\n", "\n")
    year = int(YEAR.search(text)[1])
    return Book(author, title.strip(), year, normalised(HEADER.sub("", text, count=1)))


def normalised(text):
    """NFC; line ends as \\n, none without text in a row of three; no byte order marks, no control
    characters, no spaces at the ends of lines or of the text; a line end behind it."""
    text = unicodedata.normalize("NFC", text)
    text = re.sub("[\ufeff\x00-\x08\x0b-\x1f\x7f-\x9f]", "", text)
    text = re.sub(r"[ \t]+\n", "\n", text)
    return re.sub(r"\n{3,}", "\n\n", text).strip() + "\n"


def normalised_name(author):
    """An author's name in one spelling: no accents, no capitals, letters and digits alone."""
    letters = unicodedata.normalize("NFKD", author)
    plain = "".join(c for c in letters if not unicodedata.combining(c))
    return " ".join(re.findall(r"[^\W_]+", plain.casefold()))


def split_of(author):
    """The split that all books of an author are in. An anthology, whose authors may have books of
    their own there, is for training."""
    name = normalised_name(author)
    number = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big")
    if name == "various" or number >= 2 * SHARE:
        return "train"
    return "val" if number < SHARE else "test"


# Tokens -------------------------------------------------------------------------------------------

def tokens_of(books, tokenizer):
    """The token ids of each book, with end-of-text."""
    end = end_of_text(tokenizer)
    texts = [book.text for book in books]
    if isinstance(tokenizer, BPETokenizer):
        documents = tokenizer.encode_documents(texts)
    else:
        documents = map(tokenizer.encode_to_numpy, texts)
    return [np.append(ids, np.uint32(end)) for ids in documents]


def prepare(books, tokenizer, folder):
    """Writes the data set. books: {split: [Book]}."""
    meta = {"vocab_size": tokenizer.vocab_size}
    meta["dtype"] = "uint16" if tokenizer.vocab_size <= 2**16 else "uint32"
    arrays = {}
    for split in SPLITS:
        documents = tokens_of(books[split], tokenizer)
        arrays[f"{split}.bin"] = np.concatenate(documents)
        meta[f"{split}_tokens"] = len(arrays[f"{split}.bin"])
        meta[f"{split}_bytes"] = sum(len(book.text.encode()) for book in books[split])
        meta[f"{split}_documents"] = [
            {"author": book.author, "title": book.title, "year": book.year,
             "tokens": len(ids), "bytes": len(book.text.encode())}
            for book, ids in zip(books[split], documents)]
    meta |= {"tokenizer": tokenizer.name, "source_sha256": SHA256,
             "made_by": "data/books/prepare.py"}
    write_folder(folder, arrays, tokenizer, meta)


def fetched(path):
    """The archive's path, fetched if it is not there."""
    with locked(path.parent):
        if not exists(path):
            try:
                download_file(URL, path, ARCHIVE_BYTES, DOWNLOAD_SECONDS)
            except OSError as error:
                raise BadInput(f"cannot fetch {URL}: {error}; put it there as {shown(path)}, or "
                               "name it: python data/books/prepare.py --source PATH") from error
    return path


def main(arguments=()):
    parser = Parser(prog="data/books/prepare.py", description=__doc__.split("\n")[0],
                    allow_abbrev=False)
    parser.add_argument("--source", type=Path, metavar="PATH",
                        help="a local archive or folder [default: from GitHub]")
    parser.add_argument("--name", default="books",
                        help="of the data set: books, or books_ANYTHING beside it")
    add_tokenizer_options(parser, NAMES, "gpt2")
    options = parser.parse_args(arguments)
    check_name(options.name)
    if not re.fullmatch("books(_.+)?", options.name):
        raise BadInput(f"--name={options.name}: choose books, or a name that starts with books_")
    folder = DATA / options.name
    if not is_file(folder / "prepare.py"):
        check_ours(folder, "data/books/prepare.py")
    source = options.source or fetched(DATA / "books" / "archive.tar.gz")
    books = {split: [] for split in SPLITS}
    for path, content in read_books(source).items():
        book = book_of(path, content)
        books[split_of(book.author)].append(book)
    tokenizer = tokenizer_named(options.tokenizer, folder, [book.text for book in books["train"]],
                                options.vocab_size)
    prepare(books, tokenizer, folder)


if __name__ == "__main__":
    with exit_on_bad_input("prepare.py"):
        main(sys.argv[1:])
