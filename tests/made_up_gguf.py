"""GGUF files for tests: a small LLaMA in any quantisation that is read, written by the library
`gguf`, and a slow reading of each quantisation.

The layouts of the blocks: https://github.com/ggml-org/llama.cpp/blob/master/ggml/src/ggml-quants.c
"""
import struct

import gguf
import numpy as np
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

from data.tokenizer import printable_bytes

C = 256  # channels: Q4_K and its like have blocks of 256
SMALL = dict(block_count=2, context_length=32, embedding_length=C, feed_forward_length=C,
             head_count=4, head_count_kv=2, layer_norm_rms_eps=1e-2, rope_freq_base=100.0)
EXTRA = ["<|endoftext|>", "th", "he", "the", "Ġthe"]  # behind the single bytes
MERGES = ["t h", "h e", "th e", "Ġ the"]


def small_tensors(draw, tied=False, bias=False):
    """llama.cpp's name -> array of a LLaMA as SMALL says, with the tokens of `tokens()`."""
    def matrix(rows):
        return draw.normal(scale=0.2, size=(rows, C)).astype(np.float32)

    def vector(n):
        return 1 + draw.normal(scale=0.2, size=n).astype(np.float32)

    rows = {"attn_q": C, "attn_k": C // 2, "attn_v": C // 2, "attn_output": C, "ffn_gate": C,
            "ffn_up": C, "ffn_down": C}
    tensors = {"token_embd.weight": matrix(len(tokens())), "output_norm.weight": vector(C)}
    if not tied:
        tensors["output.weight"] = matrix(len(tokens()))
    for i in range(SMALL["block_count"]):
        for name, n in rows.items():
            tensors[f"blk.{i}.{name}.weight"] = matrix(n)
            if bias:
                tensors[f"blk.{i}.{name}.bias"] = vector(n)
        for name in ("attn_norm", "ffn_norm"):
            tensors[f"blk.{i}.{name}.weight"] = vector(C)
    return tensors


def tokens():
    return [*printable_bytes().values(), *EXTRA]


def quantised(array, kind, draw):
    """The bytes of a matrix, (rows, bytes of a row): the library's, or random blocks where it can
    only read them."""
    kind = GGMLQuantizationType[kind]
    try:
        return gguf.quants.quantize(array, kind)
    except NotImplementedError:
        block, n_bytes = GGML_QUANT_SIZES[kind]
        blocks = draw.integers(256, size=(array.size // block, n_bytes), dtype=np.uint8)
        scales = np.frombuffer(struct.pack("<2e", 0.0002, 0.002), np.uint8)
        if kind == GGMLQuantizationType.Q6_K:
            blocks[:, -2:] = scales[:2]
        else:
            blocks[:, :4] = scales
        return blocks.reshape(len(array), -1)


def write(path, kind="F32", tied=False, bias=False, seed=0, tokenizer=True, **changes):
    """A GGUF with matrices of a quantisation. changes: of SMALL."""
    draw = np.random.default_rng(seed)
    writer = gguf.GGUFWriter(path, "llama")
    for name, value in (SMALL | changes).items():
        if value is not None:
            getattr(writer, f"add_{name}")(value)
    writer.add_name("made up")
    writer.add_license("apache-2.0")
    if tokenizer:
        add_tokenizer(writer)
    for name, array in small_tensors(draw, tied, bias).items():
        if array.ndim == 1 or kind == "F32":
            writer.add_tensor(name, array)
        else:
            writer.add_tensor(name, quantised(array, kind, draw),
                              raw_dtype=GGMLQuantizationType[kind])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def add_tokenizer(writer):
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(tokens())
    writer.add_token_types([3 if token in EXTRA[:1] else 1 for token in tokens()])
    writer.add_token_merges(MERGES)
    writer.add_bos_token_id(3)
    writer.add_eos_token_id(256)


# The slow reading ---------------------------------------------------------------------------------

def half(two_bytes):
    return struct.unpack("<e", two_bytes)[0]


def simple_block(kind, b):
    """32 numbers of a block of Q4_0, Q4_1, Q5_0, Q5_1 or Q8_0."""
    d = half(b[:2])
    if kind == "Q8_0":
        return [d * q for q in struct.unpack("<32b", b[2:])]
    with_minimum = kind.endswith("1")
    least = half(b[2:4]) if with_minimum else 0
    b = b[4 if with_minimum else 2:]
    high = [0] * 32
    if kind.startswith("Q5"):
        bits = int.from_bytes(b[:4], "little")
        high = [bits >> j & 1 for j in range(32)]
        b = b[4:]
    low = [q & 15 for q in b] + [q >> 4 for q in b]
    middle = 0 if with_minimum else 16 if kind.startswith("Q5") else 8
    return [d * (q + 16 * h - middle) + least for q, h in zip(low, high)]


def scale_and_minimum(s, j):
    """The j-th of eight pairs of 6-bit numbers in 12 bytes."""
    if j < 4:
        return s[j] & 63, s[j + 4] & 63
    return s[j + 4] & 15 | s[j - 4] >> 6 << 4, s[j + 4] >> 4 | s[j] >> 6 << 4


def q45_k_block(kind, b):
    """256 numbers of a block of Q4_K or Q5_K."""
    d, dmin, scales = half(b[:2]), half(b[2:4]), b[4:16]
    high = b[16:48] if kind == "Q5_K" else None
    q = b[48:] if kind == "Q5_K" else b[16:]
    y = []
    for j in range(8):
        scale, minimum = scale_and_minimum(scales, j)
        for i in range(32):
            value = q[32 * (j // 2) + i] >> 4 * (j % 2) & 15
            if high:
                value += 16 * (high[i] >> j & 1)
            y.append(d * scale * value - dmin * minimum)
    return y


def q6_k_block(b):
    low, high, scales, d = b[:128], b[128:192], struct.unpack("<16b", b[192:208]), half(b[208:])
    y = []
    for j in range(256):
        n = j // 128
        quarter, i = divmod(j % 128, 32)
        bits = low[64 * n + 32 * (quarter % 2) + i] >> 4 * (quarter // 2) & 15
        bits |= (high[32 * n + i] >> 2 * quarter & 3) << 4
        y.append(d * scales[j // 16] * (bits - 32))
    return y


def slowly(content, kind):
    """The numbers in the bytes of a tensor, one block after the other."""
    if kind == "F32":
        return np.frombuffer(content, "<f4")
    if kind == "F16":
        return np.array([half(content[i:i + 2]) for i in range(0, len(content), 2)])
    if kind == "BF16":
        pairs = [content[i:i + 2] for i in range(0, len(content), 2)]
        return np.array([struct.unpack("<f", b"\0\0" + pair)[0] for pair in pairs])
    _, n_bytes = GGML_QUANT_SIZES[GGMLQuantizationType[kind]]
    y = []
    for start in range(0, len(content), n_bytes):
        block = content[start:start + n_bytes]
        if kind == "Q6_K":
            y += q6_k_block(block)
        elif kind.endswith("_K"):
            y += q45_k_block(kind, block)
        else:
            y += simple_block(kind, block)
    return np.array(y)
