"""The tokenizers: characters, bytes, GPT-2's BPE, other byte-level BPE and, for recall tasks, plain
numbers.

Each saves itself as one JSON file that needs no other and no network.

    tokenizer = load_tokenizer("data/shakespeare_char/tokenizer.json")
    ids = tokenizer.encode("ROMEO:"); text = tokenizer.decode(ids)
"""
import base64
import functools
import io
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Annotated, Literal, Optional

import numpy as np
from pydantic import BaseModel, Field, TypeAdapter, ValidationError

from base.errors import BadInput
from base.files import read_bytes, read_json, shown

PROMPT_BYTES = 2**24  # of a prompt's file
END_OF_TEXT = "<|endoftext|>"

ENCODE = Path(__file__).with_name("encode.py")
ENCODE_SECONDS = 30  # for the process of an encoding, and for its text at 1/50 of the usual speed:
ENCODE_BYTES_PER_SECOND = 20_000

# GPT-2's rule for cutting text into words before merging, in the form that tiktoken gives it: the
# same words, less backtracking. No other is run: one from a received file may take for ever.
GPT2_PATTERN = (r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++"
                r"|\s++$|\s+(?!\S)|\s")


class CharTokenizer:
    """One token per character: token i is alphabet[i]."""
    name = "char"

    def __init__(self, alphabet):
        self.alphabet = alphabet
        self.vocab_size = len(alphabet)
        self.ids = {c: i for i, c in enumerate(alphabet)}

    def encode(self, text):
        """Token ids, a list. BadInput names the characters that the alphabet lacks."""
        return self.encode_to_numpy(text).tolist()

    def encode_to_numpy(self, text):
        """Token ids, uint32 (n,), for long texts."""
        unknown = sorted(set(text) - set(self.ids))
        if unknown:
            listed = ", ".join(map(repr, unknown[:10]))
            if len(unknown) > 10:
                listed += ", ..."
            raise BadInput(f"characters not in the alphabet of this model: {listed}; "
                           "leave them out")
        return np.fromiter(map(self.ids.__getitem__, text), np.uint32, len(text))

    def decode(self, ids):
        return "".join(self.alphabet[i] for i in ids)

    def decode_bytes(self, ids):
        return self.decode(ids).encode()

    def to_json(self):
        return json.dumps({"tokenizer": self.name, "alphabet": self.alphabet})


class GPT2Tokenizer:
    """Byte-pair encoding: token i is the bytes tokens[i], and lower tokens merge first.

    Runs on tiktoken."""
    name = "gpt2"

    def __init__(self, tokens, special_tokens):
        self.tokens = tokens                  # list of bytes
        self.special_tokens = special_tokens  # {"<|endoftext|>": its id}
        self.vocab_size = len(tokens) + len(special_tokens)

    @functools.cached_property
    def encoding(self):
        import tiktoken  # here, as characters do without
        ranks = {token: i for i, token in enumerate(self.tokens)}
        return tiktoken.Encoding(self.name, pat_str=GPT2_PATTERN, mergeable_ranks=ranks,
                                 special_tokens=self.special_tokens,
                                 explicit_n_vocab=self.vocab_size)

    def encode(self, text):
        """Token ids, a list; "<|endoftext|>" in a text is text like any other (its id:
        special_tokens["<|endoftext|>"])."""
        return self.encoding.encode_ordinary(text)

    def encode_to_numpy(self, text):
        """Token ids, uint32 (n,), for long texts."""
        return self.encoding.encode_to_numpy(text, disallowed_special=())

    def decode(self, ids):
        """Text; bytes that are no whole UTF-8 character become U+FFFD."""
        return self.encoding.decode(ids)

    def decode_bytes(self, ids):
        """The bytes of the ids: for streaming, as one character may span several tokens."""
        return self.encoding.decode_bytes(ids)

    def to_json(self):
        tokens = [base64.b64encode(token).decode() for token in self.tokens]
        return json.dumps({"tokenizer": self.name, "pattern": GPT2_PATTERN,
                           "special_tokens": self.special_tokens, "tokens": tokens})


class ByteTokenizer:
    """One token per byte of UTF-8; 0, which no text has, ends a document."""
    name = "bytes"
    vocab_size = 256
    special_tokens = {END_OF_TEXT: 0}

    def encode(self, text):
        return list(text.encode())

    def encode_to_numpy(self, text):
        return np.frombuffer(text.encode(), np.uint8).astype(np.uint32)

    def decode(self, ids):
        """Text; bytes that are no whole UTF-8 character become U+FFFD."""
        return bytes(ids).decode(errors="replace")

    def decode_bytes(self, ids):
        return bytes(ids)

    def to_json(self):
        return json.dumps({"tokenizer": self.name})


class BPETokenizer:
    """Byte-level BPE as Hugging Face's tokenizer.json describes it: token i is the bytes tokens[i].

    Encoding runs in a process of its own, data/encode.py: a received file may carry a pattern that
    never ends. Decoding only joins tokens. See bpe_of_file."""
    name = "bpe"

    def __init__(self, file, tokens, special_tokens):
        self.file = file                      # the content of tokenizer.json
        self.tokens = tokens                  # list of bytes, the special ones' too
        self.special_tokens = special_tokens  # {text: id}
        self.vocab_size = len(tokens)

    def encode(self, text):
        """Token ids, a list; special tokens in a text are text like any other. BadInput as for
        encode_documents."""
        return self.encode_to_numpy(text).tolist()

    def encode_to_numpy(self, text):
        """Token ids, uint32 (n,), for long texts."""
        return self.encode_documents([text])[0]

    def encode_documents(self, texts):
        """The token ids of each text, uint32 arrays, from one process. BadInput if that takes too
        long, or if the tokens do not spell the texts."""
        contents = [text.encode() for text in texts]
        documents = encode_apart(self.file, contents)
        for content, ids in zip(contents, documents):
            known = not len(ids) or ids.max() < self.vocab_size
            if not known or self.decode_bytes(ids.tolist()) != content:
                raise BadInput("the tokenizer does not give its text back: it changes or drops "
                               "some characters, and bits per byte would mean nothing; "
                               "choose another tokenizer")
        return documents

    def decode(self, ids):
        """Text; bytes that are no whole UTF-8 character become U+FFFD."""
        return self.decode_bytes(ids).decode(errors="replace")

    def decode_bytes(self, ids):
        return b"".join([self.tokens[i] for i in ids])

    def to_json(self):
        return json.dumps({"tokenizer": self.name, "file": self.file})


def encode_apart(file, contents):
    """The token ids, uint32 arrays, of texts (UTF-8) by a tokenizer.json, from a process that is
    ended when it takes too long: BadInput."""
    n_bytes = sum(map(len, contents))
    request = {"tokenizer": file, "lengths": list(map(len, contents))}
    limit = ENCODE_SECONDS + n_bytes / ENCODE_BYTES_PER_SECOND
    remedy = "choose another tokenizer"
    try:
        done = subprocess.run([sys.executable, "-P", ENCODE],
                              input=b"".join([json.dumps(request).encode(), b"\n", *contents]),
                              capture_output=True, timeout=limit)
    except subprocess.TimeoutExpired as error:
        raise BadInput(f"the tokenizer is not done with {n_bytes:,} bytes of text after "
                       f"{limit:.0f} s; its pattern may never end; {remedy}") from error
    if done.returncode != 0:
        lines = done.stderr.decode(errors="replace").strip().splitlines()
        reason = lines[-1] if lines else f"its process ended with status {done.returncode}"
        raise BadInput(f"the tokenizer fails: {reason[:300]}; {remedy}")
    counts, _, ids = done.stdout.partition(b"\n")
    counts = json.loads(counts)
    return np.split(np.frombuffer(ids, np.uint32), np.cumsum(counts)[:-1])


class NumberTokenizer:
    """For sets that are no text: token i is written as the number i and a space."""
    name = "numbers"

    def __init__(self, vocab_size):
        self.vocab_size = vocab_size

    def encode(self, text):
        """Token ids, a list. BadInput if the text is no list of numbers below vocab_size."""
        ids = []
        for word in text.split() or [repr(text)]:
            if not re.fullmatch("[0-9]{1,9}", word) or int(word) >= self.vocab_size:
                raise BadInput(f"{word} is no token of this model; give numbers from 0 to "
                               f"{self.vocab_size - 1}, separated by spaces")
            ids.append(int(word))
        return ids

    def decode(self, ids):
        return "".join(f"{i} " for i in ids)

    def decode_bytes(self, ids):
        return self.decode(ids).encode()

    def to_json(self):
        return json.dumps({"tokenizer": self.name, "vocab_size": self.vocab_size})


def char_tokenizer_of(text):
    return CharTokenizer("".join(sorted(set(text))))


def printable_bytes():
    """byte -> the character that GPT-2's files write it as: printable bytes as themselves, the
    other 68 as chr(256), chr(257), ..."""
    printable = [b for b in range(256) if chr(b).isprintable() and chr(b) != " "]
    others = [b for b in range(256) if b not in printable]
    return {b: chr(b) for b in printable} | {b: chr(256 + n) for n, b in enumerate(others)}


def gpt2_tokenizer(vocab_bpe):
    """GPT-2's tokenizer from the text of its vocab.bpe: a version line, then one merge `left right`
    a line, first merge first.

    The single bytes, in printable_bytes' order, are the first 256 tokens.
    """
    byte_of = {character: byte for byte, character in printable_bytes().items()}
    tokens = [bytes([b]) for b in byte_of.values()]
    for merge in vocab_bpe.split("\n")[1:-1]:
        tokens.append(bytes(byte_of[c] for c in merge.replace(" ", "")))
    return GPT2Tokenizer(tokens, {"<|endoftext|>": len(tokens)})


def same_tokens(one, other):
    """Whether token i is the same bytes in two tokenizers for each i."""
    if one.vocab_size != other.vocab_size:
        return False
    ids = range(one.vocab_size)
    return all(one.decode_bytes([i]) == other.decode_bytes([i]) for i in ids)


def end_of_text(tokenizer):
    """The id of the token that stands behind a document. BadInput if the tokenizer has none."""
    for name in (END_OF_TEXT, "<|end_of_text|>", "</s>"):
        if name in tokenizer.special_tokens:
            return tokenizer.special_tokens[name]
    raise BadInput(f"the tokenizer has no special token {END_OF_TEXT} to end a text with; "
                   "choose another one")


def train_bpe(texts, vocab_size):
    """A BPETokenizer of the most frequent merges in texts: the 256 bytes, the end of a text and up
    to vocab_size - 257 merges. Words are cut as GPT-2 cuts them."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=[END_OF_TEXT], show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    lines = (line for text in texts for line in text.splitlines(keepends=True))
    tokenizer.train_from_iterator(lines, trainer)
    return bpe_of_file(json.loads(tokenizer.to_str()), "the new tokenizer", "try another text")


# Reading them back -------------------------------------------------------------------------------

class CharFile(BaseModel):
    alphabet: str


class NumberFile(BaseModel):
    vocab_size: Annotated[int, Field(ge=1, le=2**32)]


class BPEFile(BaseModel):
    file: dict


class BPEModel(BaseModel):
    """What we read of the `model` in a tokenizer.json."""
    type: Literal["BPE"]
    vocab: dict[str, Annotated[int, Field(ge=0, lt=2**24)]]


class AddedToken(BaseModel):
    id: Annotated[int, Field(ge=0, lt=2**24)]
    content: Annotated[str, Field(min_length=1)]
    special: bool = False


class Decoder(BaseModel):
    type: Literal["ByteLevel"]


class HuggingFaceFile(BaseModel):
    """What we read of a tokenizer.json; the library `tokenizers` reads the rest."""
    model: BPEModel
    decoder: Decoder
    added_tokens: Optional[list[AddedToken]] = None


class GPT2File(BaseModel):
    tokens: list[str]
    special_tokens: dict[str, int]
    pattern: str


def load_tokenizer(path):
    """The tokenizer saved in a tokenizer.json. BadInput if the file is missing or damaged."""
    path = Path(path)
    remedy = "copy it from the data set or the run that it belongs to"
    kind = read_json(path, remedy).get("tokenizer")
    if kind == "char":
        return char_tokenizer(read_json(path, remedy, CharFile).alphabet, path, remedy)
    if kind == "numbers":
        return NumberTokenizer(read_json(path, remedy, NumberFile).vocab_size)
    if kind == "bytes":
        return ByteTokenizer()
    if kind == "gpt2":
        return gpt2_of_file(read_json(path, remedy, GPT2File), path, remedy)
    if kind == "bpe":
        return bpe_of_file(read_json(path, remedy, BPEFile).file, shown(path), remedy)
    raise BadInput(f"{shown(path)} names the tokenizer {kind!r}; have char, bytes, gpt2, bpe, "
                   f"numbers; {remedy}")


def received_tokenizer(path):
    """The tokenizer of a tokenizer.json of Hugging Face's: byte-level BPE. BadInput for any
    other."""
    remedy = "give a tokenizer.json of Hugging Face's with byte-level BPE, such as GPT-2's"
    tokenizer = bpe_of_file(read_json(path, remedy), shown(path), remedy)
    try:
        tokenizer.encode("Whether the library reads it, and how long a sentence takes.\n")
    except BadInput as error:
        raise BadInput(f"{shown(path)}: {error}") from error
    return tokenizer


def bpe_of_file(file, source, remedy):
    """The BPETokenizer of a tokenizer.json's content, a dict, that comes from `source`. BadInput if
    it is no byte-level BPE, or damaged. Nothing in it is run."""
    try:
        read = TypeAdapter(HuggingFaceFile).validate_python(file, strict=True)
    except ValidationError as error:
        detail = error.errors()[0]
        where = ".".join(map(str, detail["loc"]))[:100]
        raise BadInput(f"{source}: {where}: {detail['msg']}; {remedy}") from error
    added = {token.content: token for token in read.added_tokens or []}
    ids = read.model.vocab | {content: token.id for content, token in added.items()}
    if sorted(ids.values()) != list(range(len(ids))):
        raise BadInput(f"{source}: the ids of its {len(ids):,} tokens are not 0 to "
                       f"{len(ids) - 1:,}; {remedy}")
    byte_of = {character: byte for byte, character in printable_bytes().items()}
    tokens = [b""] * len(ids)
    for text, i in ids.items():
        if text in added:
            tokens[i] = text.encode(errors="replace")
        elif text and byte_of.keys() >= set(text):
            tokens[i] = bytes(byte_of[c] for c in text)
        else:
            raise BadInput(f"{source}: the token {text[:50]!r} is no bytes in GPT-2's letters; "
                           f"{remedy}")
    special = {content: token.id for content, token in added.items() if token.special}
    return BPETokenizer(file, tokens, special)


def char_tokenizer(alphabet, path, remedy):
    """The tokenizer of an alphabet that was read from `path`. BadInput if it can be none."""
    if not 0 < len(alphabet) == len(set(alphabet)):
        problem = "is no string of different characters"
    elif not is_unicode(alphabet):
        problem = "holds half of a surrogate pair, which is no character"
    else:
        return CharTokenizer(alphabet)
    raise BadInput(f"{shown(path)} is damaged: its alphabet {problem}; {remedy}")


def is_unicode(text):
    """Whether UTF-8 can spell a text. JSON can spell more: half of a surrogate pair."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def gpt2_of_file(saved, path, remedy):
    """The tokenizer of a GPT2File. BadInput says what is wrong with it."""
    try:
        tokens = [base64.b64decode(token, validate=True) for token in saved.tokens]
    except ValueError as error:
        raise BadInput(f"{shown(path)} is damaged: a token is no base64, {error}; "
                       f"{remedy}") from error
    special_ids = sorted(saved.special_tokens.values())
    n_tokens = len(tokens) + len(special_ids)
    single_bytes = {bytes([b]) for b in range(256)}
    problem = None
    if saved.pattern != GPT2_PATTERN:
        problem = f"its pattern {saved.pattern[:40]!r} is not GPT-2's, and no other is run"
    elif len(set(tokens)) < len(tokens):
        problem = "a token stands there twice"
    elif not single_bytes <= set(tokens):
        problem = "single bytes are missing among its tokens"
    elif special_ids != list(range(len(tokens), n_tokens)):
        problem = f"the ids of its special tokens are not {len(tokens)} .. {n_tokens - 1}"
    elif "" in saved.special_tokens or not all(map(is_unicode, saved.special_tokens)):
        problem = "a special token is empty or no text"
    if problem:
        raise BadInput(f"{shown(path)} is damaged: {problem}; {remedy}")
    return GPT2Tokenizer(tokens, saved.special_tokens)


def read_prompt(start, tokenizer):
    """Token ids of the prompt. BadInput if it is empty, unreadable or outside the alphabet."""
    if start is None and tokenizer.name == "numbers":
        raise BadInput("this model was trained on a recall task, whose tokens are numbers: "
                       "start with some, for example --start='3 40 3'")
    if start is None:
        try:
            return tokenizer.encode("\n")
        except BadInput:  # a text without line breaks
            return [0]
    if start.startswith("FILE:"):
        start = read_prompt_file(start)
    if not start:
        raise BadInput("--start is empty; give at least one character or leave it out")
    if not is_unicode(start):
        raise BadInput("--start is not UTF-8; give it as a text in UTF-8")
    return tokenizer.encode(start)


def read_prompt_file(start):
    """The text of FILE:<path>. BadInput."""
    remedy = "name a text file in UTF-8"
    try:
        text = read_bytes(Path(start[5:]), PROMPT_BYTES, remedy).decode()
    except UnicodeDecodeError as error:
        raise BadInput(f"--start={start}: {error}; {remedy}") from error
    except BadInput as error:
        raise BadInput(f"--start={start}: {error}") from error
    return io.StringIO(text, newline=None).read()  # line ends as in a file read as text
