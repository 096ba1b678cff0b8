"""The tokenizer that a --tokenizer option names: one of ours by name, or a pretrained model's."""
from pathlib import Path

from base.errors import BadInput
from base.files import exists, is_file, shown
from base.gguf import GGUF
from data.gguf_tokenizer import tokenizer_json
from data.sources import gpt2, smollm2
from data.tokenizer import ByteTokenizer, bpe_of_file, received_tokenizer, train_bpe

NAMES = ("bytes", "gpt2", "bpe", "smollm2")
BPE_VOCAB_SIZE = 4096
LEAST_VOCAB_SIZE, MOST_VOCAB_SIZE = 257, 2**20  # from the bytes and the end of a text on


def add_tokenizer_options(parser, names, default):
    parser.add_argument("--tokenizer", default=default, metavar="NAME",
                        help=f"{', '.join(names)}, or the path of a tokenizer.json or .gguf "
                             f"[default: {default}]")
    parser.add_argument("--vocab_size", type=int, metavar="N",
                        help=f"tokens of --tokenizer=bpe [default: {BPE_VOCAB_SIZE}]")


def tokenizer_named(name, folder, training_texts, vocab_size=None):
    """The tokenizer of a --tokenizer option. bpe is made from the training texts alone; gpt2 looks
    for its file in `folder`, the data set's. BadInput."""
    if vocab_size is not None and name != "bpe":
        raise BadInput(f"--vocab_size={vocab_size} goes with --tokenizer=bpe; leave it out")
    if name == "bytes":
        return ByteTokenizer()
    if name == "gpt2":
        return gpt2(folder)
    if name == "bpe":
        size = BPE_VOCAB_SIZE if vocab_size is None else vocab_size
        if not LEAST_VOCAB_SIZE <= size <= MOST_VOCAB_SIZE:
            raise BadInput(f"--vocab_size={size}: give a number from {LEAST_VOCAB_SIZE} (the bytes "
                           f"and the end of a text) to {MOST_VOCAB_SIZE:,}")
        return train_bpe(training_texts, size)
    tokenizer = pretrained_tokenizer(name)
    if tokenizer is None:
        raise BadInput(f"--tokenizer={name}: no such tokenizer and no file with one; --help lists "
                       "those by name, or name a tokenizer.json or .gguf")
    return tokenizer


def pretrained_tokenizer(name):
    """The tokenizer of a pretrained model: smollm2, a .gguf, a tokenizer.json or a folder with one.
    None where there is none. BadInput if it is one that we lack."""
    path = smollm2() if name == "smollm2" and not exists(name) else Path(name)
    if is_file(path / "tokenizer.json"):
        path = path / "tokenizer.json"
    if not is_file(path):
        return None
    if path.suffix != ".gguf":
        return received_tokenizer(path)
    file = tokenizer_json(GGUF(path))
    return file and bpe_of_file(file, shown(path), "fetch the file again")
