"""A data set from a text of your own, a UTF-8 file: the first 90 % of its characters to train on, the rest to validate.

Run: python -m data.text --input my.txt --name mine --tokenizer=char    then: python train.py --dataset=mine
"""
from pathlib import Path

from base.command_line import Parser
from base.errors import BadInput, exit_on_bad_input
from base.files import read_json
from data.files import DATA, check_name, write_text_dataset
from data.sources import gpt2, sha256_of
from data.tokenizer import char_tokenizer_of

MADE_BY = "data.text"


def check_free(folder):
    """Only what this script has made, or left half made, may be replaced. Raises BadInput."""
    made_by = None
    if (folder / "meta.json").exists():
        made_by = read_json(folder / "meta.json", f"remove data/{folder.name}, or choose another --name").get("made_by")
    elif not (folder / "prepare.py").exists():
        return
    if made_by != MADE_BY:
        raise BadInput(f"data/{folder.name} is there and was not made by data.text; choose another --name")


def decode_text(path, content):
    """The text of a file's bytes. BadInput if there is none, or if they are no text."""
    if not content:
        raise BadInput(f"{path} is empty; give a file with text")
    if b"\0" in content:
        raise BadInput(f"{path} is no text: zero byte at offset {content.index(0)}; give a plain UTF-8 text")
    try:
        return content.decode().removeprefix("\ufeff")  # a byte order mark is no part of the text
    except UnicodeDecodeError as error:
        raise BadInput(f"{path} is not UTF-8: byte {content[error.start]:#04x} at offset {error.start}; "
                       "convert it, for example with iconv -t UTF-8") from error


def main():
    parser = Parser(prog="python -m data.text", description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("--input", required=True, metavar="FILE", help="the text, UTF-8")
    parser.add_argument("--name", required=True, help="of the data set: it is written to data/NAME")
    parser.add_argument("--tokenizer", choices=("char", "gpt2"), default="char", help="[default: char]")
    options = parser.parse_args()

    check_name(options.name)
    folder = DATA / options.name
    check_free(folder)
    try:
        content = Path(options.input).read_bytes()
    except OSError as error:
        raise BadInput(f"cannot read {options.input}: {error.strerror}") from error
    text = decode_text(options.input, content)
    tokenizer = gpt2(folder) if options.tokenizer == "gpt2" else char_tokenizer_of(text)
    write_text_dataset(folder, text, tokenizer, sha256_of(content), MADE_BY)


if __name__ == "__main__":
    with exit_on_bad_input("data.text"):
        main()
