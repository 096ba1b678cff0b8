"""GGUF, the file format of llama.cpp's models.

    file = GGUF("model.gguf")
    file.values["general.name"]; file.tensor("token_embd.weight")    # dequantised, float32

The format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md. The library `gguf`
dequantises. The header is read here: the library's own reader trusts each size and offset that a
file states, and this one none.
"""
import math
import struct
from pathlib import Path
from typing import NamedTuple

import numpy as np
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType
from gguf.quants import dequantize

from base.errors import BadInput
from base.files import exists, is_file, shown

REMEDY = "fetch the file again"
MAGIC = b"GGUF"
VERSIONS = (2, 3)
ENTRIES = 2**16        # most key-value pairs, and most tensors
STRING_BYTES = 2**20   # of the longest string; chat templates have some thousands
ARRAY_ITEMS = 2**22    # of the longest array; vocabularies have some 100,000 tokens
HEADER_BYTES = 2**26   # a vocabulary of 256,000 tokens takes some 2**24
MOST_AXES = 4

NUMBERS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q",
           12: "d"}  # kind of a value -> struct's code
STRING, ARRAY = 8, 9  # the other two kinds
LEAST_BYTES = {STRING: 8} | {kind: struct.calcsize(code) for kind, code in NUMBERS.items()}

QUANTISATIONS = ("F32", "F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q4_K", "Q5_K",
                 "Q6_K")


class TensorInfo(NamedTuple):
    """Where a tensor stands in the file."""
    shape: tuple[int, ...]
    quantisation: str
    start: int    # byte of the file
    n_bytes: int


class Header:
    """Reads forward through a file, never beyond its end. BadInput where it is no GGUF."""

    def __init__(self, file, path, n_bytes):
        self.file, self.path, self.n_bytes = file, path, n_bytes
        self.position = 0

    def damaged(self, what):
        return BadInput(f"{shown(self.path)} is damaged: {what}; {REMEDY}")

    def take(self, n, what):
        """The next n bytes."""
        end = self.position + n
        if end > self.n_bytes:
            raise self.damaged(f"{what} of {n:,} bytes goes beyond its end")
        if end > HEADER_BYTES:
            raise self.damaged(f"its header has more than {HEADER_BYTES:,} bytes")
        self.position = end
        return self.file.read(n)

    def number(self, code, what):
        size = struct.calcsize(code)
        return struct.unpack(f"<{code}", self.take(size, what))[0]

    def count(self, most, what):
        n = self.number("Q", what)
        if n > most:
            raise self.damaged(f"{what} is {n:,}, and at most {most:,} are read")
        return n

    def string(self, what):
        n = self.count(STRING_BYTES, f"the length of {what}")
        try:
            return self.take(n, what).decode()
        except UnicodeDecodeError as error:
            raise self.damaged(f"{what} is no UTF-8") from error

    def value(self, what):
        kind = self.number("I", f"the kind of {what}")
        if kind == ARRAY:
            return self.array(what)
        return self.item(kind, what)

    def item(self, kind, what):
        if kind == STRING:
            return self.string(what)
        if kind not in NUMBERS:
            raise self.damaged(f"{what} is of the unknown kind {kind}")
        return self.number(NUMBERS[kind], what)

    def array(self, what):
        kind = self.number("I", f"the kind of {what}")
        n = self.count(ARRAY_ITEMS, f"the length of {what}")
        if kind == ARRAY:
            raise self.damaged(f"{what} is an array of arrays, which no model needs")
        if n * LEAST_BYTES.get(kind, 1) > self.n_bytes - self.position:
            raise self.damaged(f"{what} of {n:,} items goes beyond its end")
        if kind in NUMBERS:
            content = self.take(n * LEAST_BYTES[kind], what)
            return np.frombuffer(content, f"<{NUMBERS[kind]}").tolist()
        return [self.item(kind, what) for _ in range(n)]

    def tensor_info(self):
        """(name, shape, quantisation, offset behind the header) of the next tensor."""
        name = self.string("a tensor's name")
        shown_name = f"tensor {name[:100]}"
        n_axes = self.number("I", f"the number of axes of {shown_name}")
        if not 1 <= n_axes <= MOST_AXES:
            raise self.damaged(f"{shown_name} has {n_axes} axes, and 1 to {MOST_AXES} are possible")
        shape = [self.number("Q", f"the shape of {shown_name}") for _ in range(n_axes)]
        if 0 in shape:
            raise self.damaged(f"{shown_name} has an axis of length 0")
        kind = self.number("I", f"the quantisation of {shown_name}")
        try:
            quantisation = GGMLQuantizationType(kind).name
        except ValueError:
            quantisation = str(kind)
        if quantisation not in QUANTISATIONS:
            raise BadInput(f"{shown(self.path)}: quantisation {quantisation} of {shown_name} is "
                           f"not implemented here; have {', '.join(QUANTISATIONS)}")
        offset = self.number("Q", f"the offset of {shown_name}")
        return name, tuple(reversed(shape)), quantisation, offset  # the fastest axis comes first


class GGUF:
    """A GGUF file: .values (key -> number, text or list of them) and .tensors (name ->
    TensorInfo). BadInput, naming it, if it is damaged or has a quantisation that we lack."""

    def __init__(self, path):
        self.path = Path(path)
        if not is_file(self.path):
            wrong = "is no regular file" if exists(self.path) else "does not exist"
            raise BadInput(f"{shown(self.path)} {wrong}; name a GGUF file")
        try:
            with open(self.path, "rb") as file:
                n_bytes = self.path.stat().st_size
                self.read_header(Header(file, self.path, n_bytes))
        except OSError as error:
            raise BadInput(f"cannot read {shown(self.path)}: {error.strerror}; {REMEDY}") from error

    def read_header(self, header):
        if header.take(4, "the magic number") != MAGIC:
            raise BadInput(f"{shown(self.path)} is no GGUF file; name one, or a folder of Hugging "
                           "Face's")
        version = header.number("I", "the version")
        if version not in VERSIONS:
            raise BadInput(f"{shown(self.path)}: version {version} of GGUF (or a big-endian file) "
                           "is not implemented here; have 2 and 3, little-endian")
        n_tensors = header.count(ENTRIES, "the number of tensors")
        n_values = header.count(ENTRIES, "the number of values")
        self.values = {}
        for _ in range(n_values):
            key = header.string("a key")
            if key in self.values:
                raise header.damaged(f"the key {key[:100]} stands there twice")
            self.values[key] = header.value(f"the value of {key[:100]}")
        infos = [header.tensor_info() for _ in range(n_tensors)]
        self.place_tensors(header, infos)

    def place_tensors(self, header, infos):
        """Sets .tensors. BadInput if one lies outside the file or in another's place."""
        alignment = self.values.get("general.alignment", 32)
        if type(alignment) is not int or not 1 <= alignment <= 2**20:
            raise header.damaged(f"general.alignment is {str(alignment)[:100]}")
        first = math.ceil(header.position / alignment) * alignment
        self.tensors = {}
        for name, shape, quantisation, offset in infos:
            if name in self.tensors:
                raise header.damaged(f"the tensor {name[:100]} stands there twice")
            block, block_bytes = GGML_QUANT_SIZES[GGMLQuantizationType[quantisation]]
            if shape[-1] % block:
                raise header.damaged(f"tensor {name[:100]} has rows of {shape[-1]:,}, no multiple "
                                     f"of {quantisation}'s {block}")
            n_bytes = math.prod(shape) // block * block_bytes
            if offset % alignment or first + offset + n_bytes > header.n_bytes:
                raise header.damaged(f"tensor {name[:100]}, {n_bytes:,} bytes at offset "
                                     f"{offset:,}, goes beyond its end or is not aligned")
            self.tensors[name] = TensorInfo(shape, quantisation, first + offset, n_bytes)
        end, before = 0, ""
        for name, info in sorted(self.tensors.items(), key=lambda item: item[1].start):
            if info.start < end:
                raise header.damaged(f"the tensors {before[:100]} and {name[:100]} overlap")
            end, before = info.start + info.n_bytes, name

    def tensor(self, name):
        """A tensor, dequantised, a float32 array."""
        info = self.tensors[name]
        kind = GGMLQuantizationType[info.quantisation]
        try:
            with open(self.path, "rb") as file:  # not mapped: a file that is cut kills the process
                file.seek(info.start)
                content = file.read(info.n_bytes)
        except OSError as error:
            raise BadInput(f"cannot read {shown(self.path)}: {error.strerror}; {REMEDY}") from error
        if len(content) != info.n_bytes:
            raise BadInput(f"{shown(self.path)} was cut while it was read; {REMEDY}")
        block, block_bytes = GGML_QUANT_SIZES[kind]
        rows = np.frombuffer(content, np.uint8)
        rows = rows.reshape(*info.shape[:-1], info.shape[-1] // block * block_bytes)
        with np.errstate(over="ignore", invalid="ignore"):  # of float16 scales that are no numbers
            values = dequantize(rows, kind).astype(np.float32)
        return values.reshape(info.shape)


def not_implemented(file, key, value):
    """The BadInput for a value of a GGUF's header that asks for what we lack."""
    return BadInput(f"{shown(file.path)}: {key[:100]} {str(value)[:100]} is not implemented here; "
                    "have LLaMA in its plain form")
