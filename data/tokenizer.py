"""The tokenizers: characters, GPT-2's BPE and, for recall tasks, plain numbers.

Each saves itself as one JSON file that needs no other and no network.

    tokenizer = load_tokenizer("data/shakespeare_char/tokenizer.json")
    ids = tokenizer.encode("ROMEO:"); text = tokenizer.decode(ids)
"""
import base64
import functools
import json
import re
from pathlib import Path

from base.errors import BadInput
from base.files import read_json, shown

# GPT-2's rule for cutting text into words before merging, in the form tiktoken gives it (same words, less backtracking)
GPT2_PATTERN = r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"""


class CharTokenizer:
    """One token per character: token i is alphabet[i]."""
    name = "char"

    def __init__(self, alphabet):
        self.alphabet = alphabet
        self.vocab_size = len(alphabet)
        self.ids = {c: i for i, c in enumerate(alphabet)}

    def encode(self, text):
        """Token ids. BadInput names the characters that the alphabet lacks."""
        unknown = sorted(set(text) - set(self.ids))
        if unknown:
            listed = ", ".join(map(repr, unknown[:10])) + (", ..." if len(unknown) > 10 else "")
            raise BadInput(f"characters not in the alphabet of this model: {listed}; leave them out")
        return [self.ids[c] for c in text]

    def decode(self, ids):
        return "".join(self.alphabet[i] for i in ids)

    def decode_bytes(self, ids):
        return self.decode(ids).encode()

    def to_json(self):
        return json.dumps({"tokenizer": self.name, "alphabet": self.alphabet})


class GPT2Tokenizer:
    """Byte-pair encoding: token i is the bytes tokens[i], and lower tokens merge first. Runs on tiktoken."""
    name = "gpt2"

    def __init__(self, tokens, special_tokens, pattern=GPT2_PATTERN):
        self.tokens = tokens                  # list of bytes
        self.special_tokens = special_tokens  # {"<|endoftext|>": its id}
        self.pattern = pattern
        self.vocab_size = len(tokens) + len(special_tokens)

    @functools.cached_property
    def encoding(self):
        import tiktoken  # here, as characters do without
        ranks = {token: i for i, token in enumerate(self.tokens)}
        return tiktoken.Encoding(self.name, pat_str=self.pattern, mergeable_ranks=ranks,
                                 special_tokens=self.special_tokens, explicit_n_vocab=self.vocab_size)

    def encode(self, text):
        """Token ids; "<|endoftext|>" in a text is text like any other (its id: special_tokens["<|endoftext|>"])."""
        return self.encoding.encode_ordinary(text)

    def decode(self, ids):
        """Text; bytes that are no whole UTF-8 character become U+FFFD."""
        return self.encoding.decode(ids)

    def decode_bytes(self, ids):
        """The bytes of the ids: for streaming, as one character may span several tokens."""
        return self.encoding.decode_bytes(ids)

    def to_json(self):
        tokens = [base64.b64encode(token).decode() for token in self.tokens]
        return json.dumps({"tokenizer": self.name, "pattern": self.pattern, "special_tokens": self.special_tokens,
                           "tokens": tokens})


class NumberTokenizer:
    """For sets that are no text: token i is written as the number i and a space."""
    name = "numbers"

    def __init__(self, vocab_size):
        self.vocab_size = vocab_size

    def encode(self, text):
        """Token ids. BadInput if the text is no list of numbers below vocab_size."""
        wrong = [word for word in text.split() if not re.fullmatch("[0-9]{1,9}", word) or int(word) >= self.vocab_size]
        if wrong or not text.split():
            raise BadInput(f"{wrong[0] if wrong else text!r} is no token of this model; give numbers from 0 to {self.vocab_size - 1}, "
                           "separated by spaces")
        return [int(word) for word in text.split()]

    def decode(self, ids):
        return "".join(f"{i} " for i in ids)

    def decode_bytes(self, ids):
        return self.decode(ids).encode()

    def to_json(self):
        return json.dumps({"tokenizer": self.name, "vocab_size": self.vocab_size})


def char_tokenizer_of(text):
    return CharTokenizer("".join(sorted(set(text))))


def printable_bytes():
    """byte -> the character that GPT-2's files write it as: printable bytes as themselves, the other 68 as chr(256), chr(257), ..."""
    printable = [b for b in range(256) if chr(b).isprintable() and chr(b) != " "]
    others = [b for b in range(256) if b not in printable]
    return {b: chr(b) for b in printable} | {b: chr(256 + n) for n, b in enumerate(others)}


def gpt2_tokenizer(vocab_bpe):
    """GPT-2's tokenizer from the text of its vocab.bpe: a version line, then one merge `left right` a line, first merge first.

    The single bytes, in printable_bytes' order, are the first 256 tokens.
    """
    byte_of = {character: byte for byte, character in printable_bytes().items()}
    tokens = [bytes([b]) for b in byte_of.values()]
    for merge in vocab_bpe.split("\n")[1:-1]:
        tokens.append(bytes(byte_of[c] for c in merge.replace(" ", "")))
    return GPT2Tokenizer(tokens, {"<|endoftext|>": len(tokens)})


def load_tokenizer(path):
    """The tokenizer saved in a tokenizer.json. BadInput if the file is missing or damaged."""
    remedy = "copy it from the data set or the run that it belongs to"
    saved = read_json(Path(path), remedy)
    path = shown(Path(path))
    kind = saved.get("tokenizer")
    if kind == "char":
        alphabet = saved.get("alphabet")
        if isinstance(alphabet, str) and 0 < len(alphabet) == len(set(alphabet)):
            return CharTokenizer(alphabet)
        raise BadInput(f"{path} is damaged: its alphabet is no string of different characters; {remedy}")
    if kind == "numbers":
        if type(saved.get("vocab_size")) is int and saved["vocab_size"] > 0:
            return NumberTokenizer(saved["vocab_size"])
        raise BadInput(f"{path} is damaged: its vocab_size is {saved.get('vocab_size')!r}, no positive integer; {remedy}")
    if kind == "gpt2":
        try:
            tokens = [base64.b64decode(token, validate=True) for token in saved["tokens"]]
            tokenizer = GPT2Tokenizer(tokens, dict(saved["special_tokens"]), saved["pattern"])
            if not {bytes([b]) for b in range(256)} <= set(tokens):
                raise ValueError("single bytes are missing among its tokens")
            tokenizer.encode("")  # tiktoken checks the rest: numbering, types, pattern
            return tokenizer
        except (KeyError, TypeError, ValueError, AssertionError) as error:
            raise BadInput(f"{path} is damaged: {type(error).__name__}: {error}; {remedy}") from error
    raise BadInput(f"{path} names the tokenizer {kind!r}; have char, gpt2, numbers; {remedy}")


def read_prompt(start, tokenizer):
    """Token ids of the prompt. BadInput if it is empty, unreadable or outside the alphabet."""
    if start is None and tokenizer.name == "numbers":
        raise BadInput("this model was trained on a recall task, whose tokens are numbers: start with some, for example --start='3 40 3'")
    if start is None:
        try:
            return tokenizer.encode("\n")
        except BadInput:  # a text without line breaks
            return [0]
    if start.startswith("FILE:"):
        try:
            start = Path(start[5:]).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise BadInput(f"--start={start}: {error}; name a text file in UTF-8") from error
    if not start:
        raise BadInput("--start is empty; give at least one character or leave it out")
    return tokenizer.encode(start)
