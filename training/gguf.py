"""GGUF, the file format of llama.cpp's models: LLaMA's configuration, weights and tokenizer from
it.

    file = GGUF("model.gguf")
    file.values["general.name"]; file.tensor("token_embd.weight")    # dequantised, float32

The format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md. The library `gguf`
dequantises. The header is read here: the library's own reader trusts each size and offset that a
file states, and this one none.
"""
import math
import re
import struct
from pathlib import Path
from typing import NamedTuple

import numpy as np
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType
from gguf.quants import dequantize

from base.errors import BadInput, first_few
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


# LLaMA --------------------------------------------------------------------------------------------

# key behind "llama." -> name in Hugging Face's config.json
FIELDS = {
    "block_count": "num_hidden_layers",
    "context_length": "max_position_embeddings",
    "embedding_length": "hidden_size",
    "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps",
    "rope.freq_base": "rope_theta",
}
# further keys, which may say only what follows from those above
HEAD_SIZES = ("rope.dimension_count", "attention.key_length", "attention.value_length")
NEUTRAL = {"rope.scaling.type": "none", "expert_count": 0, "expert_used_count": 0}
OTHERS = ("general.", "tokenizer.", "quantize.")  # say nothing of the function computed

# llama.cpp's tensor -> Hugging Face's
OUTER_TENSORS = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
}
BLOCK_TENSORS = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def llama_config(file):
    """What a GGUF of the architecture llama says, as a dict in the names of Hugging Face's
    config.json. BadInput names what we lack."""
    arch = file.values.get("general.architecture")
    if arch != "llama":
        raise not_implemented(file, "general.architecture", arch)
    config = {"model_type": "llama"}
    head_sizes = {}
    for key, value in file.values.items():
        name = key.removeprefix("llama.")
        if key == "llama.vocab_size" or key.startswith(OTHERS):
            continue
        if name in FIELDS and type(value) in (int, float):
            config[FIELDS[name]] = value
        elif name in HEAD_SIZES:
            head_sizes[key] = value
        elif name not in NEUTRAL or value != NEUTRAL[name]:
            raise not_implemented(file, key, value)
    missing = [f"llama.{key}" for key, name in FIELDS.items() if name not in config]
    missing = [key for key in missing if not key.endswith(("head_count_kv", "freq_base"))]
    if "token_embd.weight" not in file.tensors:
        missing.append("token_embd.weight")
    if missing:
        raise BadInput(f"{shown(file.path)} lacks {first_few(missing)}; {REMEDY}")
    for key, value in head_sizes.items():
        if type(value) is not int or value * config["num_attention_heads"] != config["hidden_size"]:
            raise not_implemented(file, key, value)
    config["vocab_size"] = file.tensors["token_embd.weight"].shape[0]
    config["tie_word_embeddings"] = "output.weight" not in file.tensors
    config["attention_bias"] = "blk.0.attn_q.bias" in file.tensors
    config["mlp_bias"] = "blk.0.ffn_up.bias" in file.tensors
    return config


def not_implemented(file, key, value):
    return BadInput(f"{shown(file.path)}: {key[:100]} {str(value)[:100]} is not implemented here; "
                    "have LLaMA in its plain form")


def llama_tensors(file, config):
    """Hugging Face's name -> float32 array. config: of llama_config. BadInput for a tensor that
    LLaMA has no place for, or with a shape that cannot be."""
    tensors = {}
    for name in file.tensors:
        theirs = hugging_face_name(name)
        if theirs is None:
            raise BadInput(f"{shown(file.path)}: no place for its tensor {name[:100]} in LLaMA; "
                           "have LLaMA in its plain form")
        tensor = file.tensor(name)
        n_head = None
        if ".attn_q." in name:
            n_head = config["num_attention_heads"]
        elif ".attn_k." in name:
            n_head = config.get("num_key_value_heads", config["num_attention_heads"])
        if n_head:
            tensor = unpermuted(file, name, tensor, n_head)
        tensors[theirs] = tensor
    return tensors


def hugging_face_name(name):
    """Of a tensor of llama.cpp's, or None: blk.3.attn_q.weight ->
    model.layers.3.self_attn.q_proj.weight."""
    outer = re.fullmatch(r"(\w+)\.(weight|bias)", name)
    if outer and outer[1] in OUTER_TENSORS:
        return f"{OUTER_TENSORS[outer[1]]}.{outer[2]}"
    inner = re.fullmatch(r"blk\.([0-9]{1,6})\.(\w+)\.(weight|bias)", name)
    if inner and inner[2] in BLOCK_TENSORS:
        return f"model.layers.{int(inner[1])}.{BLOCK_TENSORS[inner[2]]}.{inner[3]}"
    return None


def unpermuted(file, name, tensor, n_head):
    """The rows of q or k in the order of Hugging Face's.

    Their RoPE turns channel i of a head with channel i + D/2, llama.cpp's 2i with 2i + 1: its
    converter has put the rows in that order."""
    rows = tensor.shape[0]
    if rows % (2 * n_head):
        raise BadInput(f"{shown(file.path)} is damaged: tensor {name[:100]} has {rows} rows, which "
                       f"{n_head} heads cannot share; {REMEDY}")
    pairs = tensor.reshape(n_head, rows // n_head // 2, 2, *tensor.shape[1:])
    return pairs.swapaxes(1, 2).reshape(tensor.shape)


# Its tokenizer ------------------------------------------------------------------------------------

BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True,
              "use_regex": True}
# LLaMA 3's rule for cutting text into words
LLAMA3_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+")
# tokenizer.ggml.pre -> the steps that cut text into words, in Hugging Face's terms
PRE_TOKENIZERS = {
    "gpt-2": [BYTE_LEVEL],
    "smollm": [{"type": "Digits", "individual_digits": True}, BYTE_LEVEL],
    "llama-bpe": [
        {"type": "Split", "pattern": {"Regex": LLAMA3_PATTERN}, "behavior": "Isolated",
         "invert": False},
        BYTE_LEVEL | {"use_regex": False}],
}
CONTROL, USER_DEFINED = 3, 4  # of tokenizer.ggml.token_type


def tokenizer_json(file):
    """A GGUF's byte-level BPE as the content of Hugging Face's tokenizer.json, a dict; None where
    it has no tokenizer. BadInput names what we lack."""
    values = {key.removeprefix("tokenizer.ggml."): value for key, value in file.values.items()}
    if "tokenizer.ggml.model" not in file.values:
        return None
    if values["model"] != "gpt2":
        raise not_implemented(file, "tokenizer.ggml.model", values["model"])
    if values.get("pre") not in list(PRE_TOKENIZERS):
        raise not_implemented(file, "tokenizer.ggml.pre", values.get("pre"))
    tokens, merges = values.get("tokens"), values.get("merges")
    kinds = values.get("token_type")
    for key, texts in (("tokens", tokens), ("merges", merges)):
        if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
            raise BadInput(f"{shown(file.path)} is damaged: tokenizer.ggml.{key} is no list of "
                           f"texts; {REMEDY}")
    vocabulary = {token: i for i, token in enumerate(tokens)}
    if len(vocabulary) < len(tokens):
        raise BadInput(f"{shown(file.path)} is damaged: a token stands there twice; {REMEDY}")
    added = []
    for i, (token, kind) in enumerate(zip(tokens, kinds if isinstance(kinds, list) else [])):
        if kind in (CONTROL, USER_DEFINED):
            added.append({"id": i, "content": token, "single_word": False, "lstrip": False,
                          "rstrip": False, "normalized": False, "special": kind == CONTROL})
    model = {"type": "BPE", "vocab": vocabulary, "merges": [merge.split(" ") for merge in merges],
             "ignore_merges": values["pre"] == "llama-bpe"}
    return {
        "version": "1.0",
        "added_tokens": added,
        "normalizer": None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": PRE_TOKENIZERS[values["pre"]]},
        "post_processor": None,
        "decoder": BYTE_LEVEL,
        "model": model,
    }
