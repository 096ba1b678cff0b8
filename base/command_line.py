"""How options are read: the command line over the config file over the defaults.

argparse reads the command line, runpy a config file; pydantic checks the values of both.
"""
import argparse
import difflib
import runpy
import textwrap
import types
import typing
from dataclasses import dataclass, fields
from typing import Optional

from pydantic import TypeAdapter, ValidationError

from base.errors import BadInput
from base.files import is_file
from base.terminal import is_terminal, width

# what newcomers type -> what it is called here, or where it is
OTHER_NAMES = {
    "lr": "learning_rate", "layers": "n_layer", "num_layers": "n_layer", "depth": "n_layer",
    "heads": "n_head", "num_heads": "n_head", "dim": "n_embd", "d_model": "n_embd",
    "width": "n_embd", "context": "block_size", "context_length": "block_size",
    "seq_len": "block_size", "steps": "max_iters", "max_steps": "max_iters",
    "iters": "max_iters", "attention": "mixer", "model": "mixer", "activation": "mlp_activation",
    "output_dir": "out_dir", "random_seed": "seed", "wd": "weight_decay",
    "grad_accum": "gradient_accumulation_steps", "warmup": "warmup_iters", "data": "dataset",
    "dropout_rate": "dropout", "precision": "dtype", "optim": "optimizer",
}
ELSEWHERE = {
    "epochs": "there are no epochs, only steps: --max_iters",
    "tokenizer": "a data set brings its own: choose another --dataset, or make one of your text "
                 "with python -m data.text --tokenizer=...",
    "config": "name the config file without an option: train.py configs/shakespeare.py",
}


def is_bool(annotation):
    return annotation is bool or bool in typing.get_args(annotation)


def nearest(name, names, otherwise="; --help lists them all"):
    """The end of a message on a name that is none: the known one that is most like it."""
    match = difflib.get_close_matches(name, names, n=1, cutoff=0.6)
    return f"; nearest: {match[0]}" if match else otherwise


def nearest_option(name, names):
    """The same for an option, as it is written in a config file: also by what others call it."""
    if name in ELSEWHERE:
        return f"; {ELSEWHERE[name]}"
    if OTHER_NAMES.get(name) in names:
        return f"; nearest: {OTHER_NAMES[name]}"
    return nearest(name, names)


def complaint(error):
    """(option's name or "", what is wrong with it) of a ValueError.

    Of pydantic's, the first complaint; of others, the text."""
    if not isinstance(error, ValidationError):
        return "", str(error)
    detail = error.errors()[0]
    place = detail["loc"]
    name = place[0] if place and isinstance(place[0], str) else ""
    message = detail["msg"].removeprefix("Value error, ")
    if name == "":
        return name, message
    return name, message[0].lower() + message[1:]


def one_line(error):
    """A ValueError of GPTConfig or Options in words, with the option's name."""
    name, message = complaint(error)
    return f"{name}: {message}" if name else message


def shortened(text):
    return text if len(text) <= 200 else text[:200] + "..."


def repr_of(value):
    """A value of a config file as messages show it, whatever it is."""
    try:
        return shortened(repr(value))
    except Exception:  # of an integer with 5,000 digits, or a class of the user's own
        return f"<{type(value).__name__}>"


# Config files -----------------------------------------------------------------------------------

def run_config_file(path):
    """All names that a config file leaves behind, name -> value. BadInput if it does not run."""
    if not is_file(path):
        raise BadInput(f"config file {shortened(path)} does not exist, or is no file")
    try:
        return runpy.run_path(str(path))
    except (Exception, SystemExit) as error:  # the user's own code: whatever it raises
        raise BadInput(f"config file {path}: {type(error).__name__}: {error}") from error


def settings_among(names):
    """What a config file sets, name -> value, of all its names: not what it may need besides, which
    is imports, functions and names with an underscore."""
    found = {}
    for name, value in names.items():
        is_helper = isinstance(value, (types.ModuleType, type)) or callable(value)
        if not name.startswith("_") and not is_helper:
            found[name] = value
    return found


def options_among(names, path, cls):
    """The options of cls among a config file's names.

    BadInput for a name that is none, or a bad value."""
    known = [f.name for f in fields(cls)]
    values = settings_among(names)
    for name in values:
        if name not in known:
            raise BadInput(f"config file {path}: no option {name!r}{nearest_option(name, known)}")
    try:
        cls(**values)
    except (ValidationError, OverflowError) as error:
        name, message = complaint(error)
        wrong = "" if name == "" else f"{name} = {repr_of(values.get(name))}: "
        raise BadInput(f"config file {path}: {wrong}{message}") from error
    return values


def read_config_file(path, cls):
    """The options of cls that a config file sets, name -> value. BadInput if anything is wrong."""
    return options_among(run_config_file(path), path, cls)


# The command line -------------------------------------------------------------------------------

class Help(argparse.HelpFormatter):
    """As wide as the terminal, up to 120 characters; a name is never broken at its hyphens."""

    def __init__(self, prog):
        columns = min(120, max(80, width())) if is_terminal() else 120
        super().__init__(prog, max_help_position=34, width=columns)

    def _split_lines(self, text, width):
        return textwrap.wrap(" ".join(text.split()), width, break_on_hyphens=False)


class Parser(argparse.ArgumentParser):
    def error(self, message):
        raise BadInput(message)


def make_parser(cls, description, with_config_file):
    usage = "%(prog)s [config_file] [--option=value ...]"
    if not with_config_file:
        usage = "%(prog)s [--option=value ...]"
    parser = Parser(
        usage=usage, description=description, allow_abbrev=False,
        argument_default=argparse.SUPPRESS, formatter_class=Help)
    if with_config_file:
        parser.add_argument("config_file", nargs="?", help=(
            "a Python file that sets options, for example configs/shakespeare.py"))
    groups = {}
    for f in fields(cls):
        heading = heading_of(cls, f.name)
        if heading not in groups:
            groups[heading] = parser.add_argument_group(heading)
        groups[heading].add_argument(f"--{f.name}", metavar=metavar(f.type), help=help_of(f))
    return parser


def heading_of(cls, name):
    """Under what --help lists an option: what the class that declares it says."""
    for member in cls.__mro__:
        if name in vars(member).get("__annotations__", {}):
            headings = vars(member).get("headings", {})
            return headings.get(name) or vars(member).get("heading", "options")
    raise KeyError(name)


def metavar(annotation):
    """What --help shows for an option's value: True|False, table|published, int."""
    kind = annotation
    if type(None) in typing.get_args(annotation):
        kind = typing.get_args(annotation)[0]
    if kind is bool:
        return "True|False"
    return "|".join(typing.get_args(kind)) or kind.__name__


def help_of(f):
    """The help of an option, with the names it knows, its default and how to switch it off."""
    info = f.default  # pydantic's Field
    names = info.json_schema_extra["names"]
    text = info.description
    if names:
        text += f"; have {', '.join(names())}"
    if info.default is not None:
        text += f" [default: {info.default}]"
    if is_bool(f.type):
        text += f"; or --no-{f.name}"
    return text.replace("%", "%%")


def spell_out(argv, bools):
    """`--compile`, `--compile False` and `--no-compile` as `--compile=True` or `=False`.

    A boolean must not swallow the word behind it, which may be the config file."""
    spelt = []
    words = list(argv)
    while words:
        word = words.pop(0)
        if word.startswith("--no-") and word[5:] in bools:
            word = f"--{word[5:]}=False"
        elif word.startswith("--") and word[2:] in bools:
            value = "True"
            if words and words[0].lower() in ("true", "false", "none"):
                value = words.pop(0)
            word += f"={value}"
        spelt.append(word)
    return spelt


def from_text(text, annotation):
    """A value from the command line, checked for its type.

    "none" unsets an option that may be unset and is not itself a text."""
    kinds = typing.get_args(annotation)
    may_be_unset = type(None) in kinds and str not in kinds
    if may_be_unset and text.lower() == "none" and text not in typing.get_args(kinds[0]):
        return None
    if is_bool(annotation) and text.lower() not in ("true", "false"):
        raise BadInput(f"{text!r} is neither True nor False")
    return TypeAdapter(annotation).validate_strings(text)


@dataclass
class Given:
    """What a user gave: by the command line, and by the config file that it names."""
    cls: type
    on_command_line: dict
    config_file: Optional[str]
    in_config_file: dict
    per_mixer: dict  # of the config file: mixer -> {option: value}

    def options(self, base={}, mixer=None):
        """The options, an instance of cls: the defaults, over them the config file, what it has for
        that mixer alone, `base` (name -> value; a resumed run's own), the command line. BadInput
        for values that do not fit."""
        own = self.per_mixer.get(mixer, {})
        values = {**self.in_config_file, **own, **base, **self.on_command_line}
        try:
            return self.cls(**values)
        except ValidationError as error:
            name, message = complaint(error)
            value = shortened(str(values.get(name)))
            raise BadInput(f"--{name}={value}: {message}") from error


def read_given(cls, argv, description, with_config_file=True, file_class=None, leave_out=()):
    """Reads a command line, and the config file that it names, once: Given. BadInput.

    A config file sets options of cls; or those of file_class, of which those that cls has too
    count, but for the names in leave_out. What differs by mixer stands in its dict per_mixer."""
    check_text(argv)
    config_file = find_config_file(cls, argv) if with_config_file else None
    names = run_config_file(config_file) if config_file else {}
    for f in fields(cls):
        first = f.default.json_schema_extra["first"]
        value = early_value(f, argv, names) if first else None
        if isinstance(value, str):
            first(value)  # which may add options to cls
    on_command_line = read_command_line(cls, argv, description, with_config_file)
    config_file = on_command_line.pop("config_file", None)
    in_file, per_mixer = {}, {}
    if config_file:
        names = dict(names or run_config_file(config_file))
        per_mixer = per_mixer_among(names, config_file, file_class or cls)
        in_file = options_among(names, config_file, file_class or cls)
    counting = {f.name for f in fields(cls)} - set(leave_out)
    for values in (in_file, *per_mixer.values()):
        for name in [name for name in values if name not in counting]:
            del values[name]
        for name, value in values.items():
            if isinstance(value, str):
                check_text([value], f"{name} in config file {config_file}")
    return Given(cls, on_command_line, config_file, in_file, per_mixer)


def one_spelling(mixer):
    """A mixer or a layer pattern as the option mixer has it: softmax,lln of "softmax + lln"."""
    return ",".join(name.strip() for name in mixer.replace("+", ",").split(","))


def per_mixer_among(names, path, cls):
    """Takes per_mixer, {mixer: {option of cls: value}}, out of a config file's names. A pattern is
    spelt as the option mixer is afterwards. BadInput for what is none."""
    found = {}
    per_mixer = names.pop("per_mixer", {})
    if not isinstance(per_mixer, dict):
        raise BadInput(f"config file {path}: per_mixer is no dict; "
                       'write per_mixer = {"softmax": dict(learning_rate=3e-3)}')
    for mixer, values in per_mixer.items():
        place = f"{path}, per_mixer[{repr_of(mixer)}]"
        if not isinstance(mixer, str) or not isinstance(values, dict):
            raise BadInput(f"config file {place}: no mixer's name and a dict of its options; "
                           'write per_mixer = {"softmax": dict(learning_rate=3e-3)}')
        if "mixer" in values:
            raise BadInput(f"config file {place}: mixer itself cannot be set there; leave it out")
        found[one_spelling(mixer)] = options_among(values, place, cls)
    return found


def paths_and_options(cls, words, description):
    """(paths, an instance of cls, names of the options that were given) of a command line on which
    paths come first. BadInput."""
    count = 0
    while count < len(words) and not words[count].startswith("-"):
        count += 1
    options, _, given = parse_options(cls, words[count:], f"{description} Folders come first.",
                                      with_config_file=False)
    return words[:count], options, given


def check_text(words, where=None):
    """BadInput for text that no file or option can be called."""
    for word in words:
        place = where or shortened(word.partition("=")[0])
        if "\0" in word:
            raise BadInput(f"{place} holds a zero byte; leave it out")
        if any("\ud800" <= c <= "\udfff" for c in word):  # what Python makes of such bytes
            raise BadInput(f"{place} holds bytes that are no UTF-8; write it in UTF-8")


def find_config_file(cls, argv):
    """The config file on a command line of which not all options are known yet, or None."""
    parser = Parser(allow_abbrev=False, add_help=False, argument_default=argparse.SUPPRESS)
    for f in fields(cls):
        parser.add_argument(f"--{f.name}")
    _, rest = parser.parse_known_args(spell_out(argv, bools_of(cls)))
    for word in rest:
        if not word.startswith("-") and is_file(word):
            return word
    return None


def early_value(f, argv, names):
    """The value of an option that is needed before the command line can be read as a whole."""
    parser = Parser(allow_abbrev=False, add_help=False, argument_default=argparse.SUPPRESS)
    parser.add_argument(f"--{f.name}")
    known, _ = parser.parse_known_args(argv)
    return getattr(known, f.name, names.get(f.name))


def bools_of(cls):
    return [f.name for f in fields(cls) if is_bool(f.type)]


def read_command_line(cls, argv, description, with_config_file):
    """The options that a command line sets, name -> value, and config_file. BadInput."""
    kinds = {f.name: f.type for f in fields(cls)}
    bools = bools_of(cls)
    parser = make_parser(cls, description, with_config_file)
    arguments, rest = parser.parse_known_args(spell_out(argv, bools))
    if rest:
        raise BadInput(unknown(rest[0], kinds, bools))
    given = vars(arguments)
    for name, text in given.items():
        if name == "config_file":
            continue
        if text == []:  # argparse's reading of `--name=--`
            raise BadInput(f"--{name}=--: a value is missing")
        try:
            given[name] = from_text(text, kinds[name])
        except ValueError as error:
            raise BadInput(f"--{name}={shortened(text)}: {complaint(error)[1]}") from error
    return given


def unknown(word, known, bools):
    """What is wrong with a word of the command line that is no option's."""
    name = word.partition("=")[0]
    if not name.startswith("-"):
        return f"unexpected argument {name!r}"
    plain = name.removeprefix("--")
    if plain in ELSEWHERE or plain in OTHER_NAMES:
        near = nearest_option(plain, known).replace("nearest: ", "nearest: --")
    else:
        near = nearest(name, [f"--{n}" for n in known] + [f"--no-{n}" for n in bools])
    return f"no option {name}{near}"


def parse_options(cls, argv, description, with_config_file=True, base={}, file_class=None,
                  leave_out=()):
    """Options from a command line, see read_given and Given.options.

    Returns (options, config file or None, names set on the command line)."""
    given = read_given(cls, argv, description, with_config_file, file_class, leave_out)
    return given.options(base), given.config_file, set(given.on_command_line)
