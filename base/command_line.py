"""How options are read: the command line over the config file over the defaults.

argparse reads the command line, runpy a config file; pydantic checks the values of both.
"""
import argparse
import difflib
import runpy
import types
import typing
from dataclasses import fields

from pydantic import TypeAdapter, ValidationError

from base.errors import BadInput
from base.files import is_file


def is_bool(annotation):
    return annotation is bool or bool in typing.get_args(annotation)


def nearest(name, names):
    match = difflib.get_close_matches(name, names, n=1, cutoff=0.6)
    return f"; nearest: {match[0]}" if match else "; --help lists them all"


def complaint(error):
    """(option name or "", what is wrong with it) of a ValueError: pydantic's first complaint, or its text."""
    if not isinstance(error, ValidationError):
        return "", str(error)
    detail = error.errors()[0]
    name = str(detail["loc"][0]) if detail["loc"] and isinstance(detail["loc"][0], str) else ""
    message = detail["msg"].removeprefix("Value error, ")
    return name, message if name == "" else message[0].lower() + message[1:]


def one_line(error):
    """A ValueError of GPTConfig or Options in words, with the option's name."""
    return ": ".join(filter(None, complaint(error)))


def read_config_file(path, cls):
    """The options that a config file sets, name -> value. BadInput if it does not run or sets an unknown name."""
    if not is_file(path):
        raise BadInput(f"config file {path} does not exist")
    try:
        names = runpy.run_path(str(path))
    except (Exception, SystemExit) as error:  # the user's own code: whatever it raises, they need the place and the reason
        raise BadInput(f"config file {path}: {type(error).__name__}: {error}") from error
    known = [f.name for f in fields(cls)]
    values = {}
    for name, value in names.items():
        # what a config may need besides options: imports, functions, names with an underscore
        if name.startswith("_") or isinstance(value, (types.ModuleType, type)) or callable(value):
            continue
        if name not in known:
            raise BadInput(f"config file {path}: no option {name!r}{nearest(name, known)}")
        values[name] = value
    try:
        cls(**values)
    except ValidationError as error:
        name, message = complaint(error)
        raise BadInput(f"config file {path}: {name} = {values.get(name)!r}: {message}") from error
    return values


class Parser(argparse.ArgumentParser):
    def error(self, message):
        raise BadInput(message)


def make_parser(cls, description, with_config_file):
    usage = "%(prog)s [config_file] [--option=value ...]" if with_config_file else "%(prog)s [--option=value ...]"
    parser = Parser(usage=usage, description=description, allow_abbrev=False, argument_default=argparse.SUPPRESS,
                    formatter_class=lambda prog: argparse.HelpFormatter(prog, max_help_position=34, width=120))
    if with_config_file:
        parser.add_argument("config_file", nargs="?", help="a Python file that sets options, for example configs/shakespeare.py")
    for f in fields(cls):
        info = f.default  # pydantic's Field: default, help and limits
        hint = info.description + ("" if info.default is None else f" [default: {info.default}]")
        hint = hint.replace("%", "%%")
        kind = typing.get_args(f.type)[0] if type(None) in typing.get_args(f.type) else f.type
        metavar = "True|False" if kind is bool else "|".join(typing.get_args(kind)) or kind.__name__
        parser.add_argument(f"--{f.name}", metavar=metavar, help=hint + (f"; or --no-{f.name}" if kind is bool else ""))
    return parser


def spell_out(argv, bools):
    """`--compile`, `--compile False` and `--no-compile` as `--compile=True` or `=False`: a boolean must not swallow the
    word behind it, which may be the config file."""
    out, argv = [], list(argv)
    while argv:
        word = argv.pop(0)
        if word.startswith("--no-") and word[5:] in bools:
            word = f"--{word[5:]}=False"
        elif word.startswith("--") and word[2:] in bools:
            word += "=" + (argv.pop(0) if argv and argv[0].lower() in ("true", "false", "none") else "True")
        out.append(word)
    return out


def from_text(text, annotation):
    """A value from the command line. "none" unsets an option that may be unset and is not itself a text."""
    kinds = typing.get_args(annotation)
    if text.lower() == "none" and type(None) in kinds and str not in kinds and text not in typing.get_args(kinds[0]):
        return None
    if is_bool(annotation) and text.lower() not in ("true", "false"):
        raise BadInput(f"{text!r} is neither True nor False")
    return TypeAdapter(annotation).validate_strings(text)


def parse_options(cls, argv, description, with_config_file=True, base={}, of_config_files=None, file_class=None):
    """Options from a command line: the defaults, over them the config file, `base` (dict), the command line. A config file
    sets options of cls, or those of file_class, of which the names in of_config_files count.
    Returns (options, config file or None, names set on the command line)."""
    known = {f.name: f.type for f in fields(cls)}
    parser = make_parser(cls, description, with_config_file)
    arguments, rest = parser.parse_known_args(spell_out(argv, [n for n, t in known.items() if is_bool(t)]))
    if rest:
        name = rest[0].partition("=")[0]
        names = [f"--{n}" for n in known] + [f"--no-{n}" for n, t in known.items() if is_bool(t)]
        what = f"no option {name}{nearest(name, names)}" if name.startswith("-") else f"unexpected argument {name!r}"
        raise BadInput(what)
    given = vars(arguments)
    config_file = given.pop("config_file", None)
    for name, text in given.items():
        if text == []:  # argparse's reading of `--name=--`
            raise BadInput(f"--{name}=--: a value is missing")
        try:
            given[name] = from_text(text, known[name])
        except ValueError as error:
            raise BadInput(f"--{name}={text}: {complaint(error)[1]}") from error
    values = read_config_file(config_file, file_class or cls) if config_file else {}
    values = {name: value for name, value in values.items() if not of_config_files or name in of_config_files}
    for name, value in {**values, **given}.items():
        if isinstance(value, str) and "\0" in value:
            raise BadInput(f"{name} holds a zero byte; leave it out")
    try:
        return cls(**{**values, **base, **given}), config_file, set(given)
    except ValidationError as error:
        name, message = complaint(error)
        raise BadInput(f"--{name}={given.get(name, base.get(name))}: {message}") from error
