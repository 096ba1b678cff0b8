"""Prepares a data set again that train.py prepares by itself. Run: python -m data.prepare mqar
(seconds)"""
import sys

from base.command_line import Parser
from base.errors import BadInput, exit_on_bad_input
from data import dataset, files


def main(arguments):
    parser = Parser(prog="python -m data.prepare", description=__doc__, allow_abbrev=False)
    parser.add_argument("name", help=f"one of {', '.join(dataset.dataset_names())}")
    name = parser.parse_args(arguments).name
    files.check_name(name)
    folder = dataset.DATA / name
    if not dataset.prepares_itself(folder):
        raise BadInput(f"data/{name} does not prepare itself; give its text: "
                       f"python -m data.text --input FILE --name {name}")
    dataset.prepare_again(folder)


if __name__ == "__main__":
    with exit_on_bad_input("data.prepare"):
        main(sys.argv[1:])
