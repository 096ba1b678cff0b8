"""A data set from a text of your own, a UTF-8 file: the first 90 % of its characters to train on,
the rest to validate.

Run: python -m data.text --input my.txt --name mine --tokenizer=char
     python -m data.text --input my.txt --name mine --tokenizer=bpe --vocab_size=4096
Then: python train.py --dataset=mine

For a pretrained model the text takes the model's own tokenizer: --tokenizer=smollm2, or
--tokenizer=MODEL.gguf, or --tokenizer=FOLDER/tokenizer.json.
"""
from pathlib import Path

from base.command_line import Parser
from base.errors import BadInput, exit_on_bad_input
from base.files import read_bytes
from data.files import DATA, check_name, check_ours, write_text_dataset
from data.named_tokenizer import NAMES, add_tokenizer_options, tokenizer_named
from data.sources import sha256_of
from data.tasks import RECALL_SETS
from data.tokenizer import char_tokenizer_of

MADE_BY = "data.text"
TEXT_BYTES = 2**30  # the largest text that is read: it and its tokens take ten times as much


def decode_text(path, content):
    """The text of a file's bytes. BadInput if there is none, or if they are no text."""
    if not content:
        raise BadInput(f"{path} is empty; give a file with text")
    if b"\0" in content:
        raise BadInput(f"{path} is no text: zero byte at offset {content.index(0)}; "
                       "give a plain UTF-8 text")
    try:
        return content.decode().removeprefix("\ufeff")  # a byte order mark is no part of the text
    except UnicodeDecodeError as error:
        raise BadInput(f"{path} is not UTF-8: byte {content[error.start]:#04x} at offset "
                       f"{error.start}; convert it, for example with iconv -t UTF-8") from error


def main():
    parser = Parser(prog="python -m data.text", description=" ".join(__doc__.split("\n")[:2]),
                    allow_abbrev=False)
    parser.add_argument("--input", required=True, metavar="FILE", help="the text, UTF-8")
    parser.add_argument("--name", required=True, help="of the data set: it is written to data/NAME")
    add_tokenizer_options(parser, ("char", *NAMES), "char")
    options = parser.parse_args()

    check_name(options.name)
    if options.name in RECALL_SETS:
        raise BadInput(f"data/{options.name} is a recall task; choose another name")
    folder = DATA / options.name
    check_ours(folder, MADE_BY)
    content = read_bytes(Path(options.input), TEXT_BYTES, "give a plain UTF-8 text")
    text = decode_text(options.input, content)
    if options.tokenizer == "char" and options.vocab_size is None:
        tokenizer = char_tokenizer_of(text)
    else:
        tokenizer = tokenizer_named(options.tokenizer, folder, [text[:int(len(text) * 0.9)]],
                                    options.vocab_size)
    write_text_dataset(folder, text, tokenizer, sha256_of(content), MADE_BY)


if __name__ == "__main__":
    with exit_on_bad_input("data.text"):
        main()
