"""Questions about a data set's text, for tools/audit_metric.py: bytes, tokens, overlap.

    for answer in about_text(load_dataset("shakespeare_char", block_size=1)): ...
"""
import numpy as np

from base.errors import BadInput, printable
from tools.audit_answers import MEANING, Answer

SAMPLE = 2**17       # tokens that are decoded and encoded again
PIECE = 64           # bytes in a row that count as overlap; a power of two
MOST_OVERLAP = 0.01  # of the validation text's bytes
VAL_BYTES = 2**23    # of the validation text that are looked for, and of the training text at once
BYTES_LIMIT = 1e-3   # relative
STRINGS = (" a", "  two spaces", "a  b ", "\n\n", "tab\there", "don't", "1234567", "é ü 中文 🙂",
           "<|endoftext|>", " \n leading", "The END, Iago", "e\u0301 \ufb01ne \u00a0 \u2009")
MEANING |= {
    "bytes": "bits per byte are wrong by that factor: count the bytes of the decoded text, not of "
             "the tokens' spellings, in which a space may count twice or not at all",
    "tokens": "the tokenizer does not give its text back, or the tokens are not its own: bits per "
              "byte of other tokenizers do not compare",
    "overlap": "pieces of the validation text were trained on: the loss measures memory; look at "
               "the split, and at duplicates",
}


def about_text(data):
    """Yields the Answers about a Dataset; of a recall task only the overlap of rows."""
    if data.bytes_per_token is None:
        yield rows_overlap(data)
        return
    yield bytes_per_token(data)
    yield tokens_and_text(data)
    yield overlap(data)


def decoded(data, tokens):
    return data.tokenizer.decode_bytes(np.asarray(tokens).tolist())


def bytes_per_token(data):
    """What the data set declares for its validation split, against the decoded text."""
    n_bytes = sum(len(decoded(data, part)) for part in parts(data.val))
    real = n_bytes / len(data.val)
    size = abs(data.bytes_per_token / real - 1)
    figures = (f"{data.bytes_per_token:.4f} bytes a token declared, {real:.4f} in "
               f"{len(data.val):,} decoded tokens")
    return Answer("bytes", size <= BYTES_LIMIT, figures, size, BYTES_LIMIT)


def parts(tokens, size=VAL_BYTES):
    for start in range(0, len(tokens), size):
        yield tokens[start:start + size]


def tokens_and_text(data):
    tokenizer = data.tokenizer
    strings = [*STRINGS, *slices(decoded(data, data.val[:SAMPLE]).decode(errors="ignore"))]
    skipped = 0
    for text in strings:
        try:
            back = tokenizer.decode(tokenizer.encode(text))
        except BadInput:  # characters that an alphabet does not have
            skipped += 1
            continue
        if back != text:
            return Answer("tokens", False, f"{text[:40]!r} becomes {back[:40]!r}",
                          smallest={"text": text[:200], "becomes": back[:200]})
    stored, anew = again(data)
    size = abs(anew / stored - 1)
    figures = (f"{len(strings) - skipped} strings are the same; {stored:,} tokens of the "
               f"validation text are {anew:,} when encoded anew")
    return Answer("tokens", size <= BYTES_LIMIT, figures, size, BYTES_LIMIT)


def slices(text, n=20, length=60):
    step = max(1, (len(text) - length) // n)
    return [text[i:i + length] for i in range(0, max(1, len(text) - length), step)][:n]


def again(data):
    """(tokens, tokens of the same text encoded anew) of documents at the beginning of the
    validation split; those that stand for no text are left out."""
    special = set(getattr(data.tokenizer, "special_tokens", {}).values())
    tokens = np.asarray(data.val[:SAMPLE])
    ends = np.flatnonzero(np.isin(tokens, list(special)))
    stored = anew = 0
    for document in np.split(tokens, ends):
        document = document[1:] if len(document) and document[0] in special else document
        content = decoded(data, document)
        try:
            text = content.decode()
        except UnicodeDecodeError:  # cut within a character, at the end of the sample
            text = content.decode(errors="ignore")
        if text:
            stored += len(document)
            anew += len(data.tokenizer.encode(text))
    return max(stored, 1), anew


# Overlap ------------------------------------------------------------------------------------------

def hashes(content):
    """The hash of each PIECE bytes in a row, uint64 (n - PIECE + 1)."""
    h = np.frombuffer(content, np.uint8).astype(np.uint64) + np.uint64(1)
    factor = np.uint64(0x9E3779B97F4A7C15)
    length = 1
    while length < PIECE:
        h = h[:-length] * factor + h[length:]  # modulo 2^64
        factor = factor * factor
        length *= 2
    return h


def overlap(data):
    with np.errstate(over="ignore"):
        val = decoded(data, data.val)[:VAL_BYTES]
        if len(val) < PIECE:
            return Answer("overlap", None, "the validation text is too short")
        of_val = hashes(val)
        known = np.sort(of_val)
        seen = []  # hashes of the validation text that the training text has
        tail = b""
        for part in parts(data.train):
            content = tail + decoded(data, part)
            tail = content[-PIECE + 1:]
            if len(content) < PIECE:
                continue
            h = hashes(content)
            at = np.searchsorted(known, h).clip(max=len(known) - 1)
            seen.append(np.unique(h[known[at] == h]))
    common = np.isin(of_val, np.concatenate(seen)) if seen else np.zeros(len(of_val), bool)
    return told(common, val)


def told(common, val):
    """The Answer from which pieces, by their first byte, are in both texts."""
    starts = np.flatnonzero(common & ~np.append(False, common[:-1]))
    ends = np.flatnonzero(common & ~np.append(common[1:], False)) + PIECE
    covered = np.zeros(len(val), bool)
    longest, at = 0, 0
    for start, end in zip(starts, ends):
        covered[start:end] = True
        if end - start > longest:
            longest, at = int(end - start), int(start)
    share = float(covered.mean())
    figures = (f"{share:.2%} of the validation text's bytes are in pieces of {PIECE} and more that "
               f"the training text has too, limit {MOST_OVERLAP:.0%}")
    smallest = None
    if longest:
        piece = val[at:at + longest].decode(errors="replace")
        figures += f"; the longest has {longest:,} bytes: {printable(piece[:60])!r}"
        smallest = {"at byte": at, "bytes": longest, "text": piece[:200]}
    return Answer("overlap", share <= MOST_OVERLAP, figures, share, MOST_OVERLAP, smallest)


def rows_overlap(data):
    """Of a recall task: rows of the val and test splits that are rows of training."""
    train = {row.tobytes() for row in np.asarray(data.train)}
    most, figures = 0.0, []
    for split, (tokens, _) in data.splits.items():
        if split == "train":
            continue
        width = min(tokens.shape[1], data.train.shape[1])
        same = sum(row[:width].tobytes() in train for row in np.asarray(tokens))
        most = max(most, same / len(tokens))
        figures.append(f"{same:,} of {len(tokens):,} rows of {split} are rows of training")
    return Answer("overlap", most <= MOST_OVERLAP, "; ".join(figures), most, MOST_OVERLAP)
