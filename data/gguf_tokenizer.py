"""The byte-level BPE of a GGUF as the content of Hugging Face's tokenizer.json."""
from base.errors import BadInput
from base.files import shown
from base.gguf import REMEDY, not_implemented

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
