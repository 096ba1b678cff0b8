"""Claim cards: a sentence of a paper as an experiment, written down before it is run.

    claims/<name>.toml, for example claims/causal_reduction.toml; docs/claims.md explains each key

A card is read by tomllib: nothing in it is executed. What it names is, once it is run: the recipe
and a mixer_file are Python.
"""
import json
import re
import tomllib
from dataclasses import fields
from hashlib import sha256
from pathlib import Path
from typing import Annotated, Any, Literal, Optional

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from base.command_line import (
    OTHER_NAMES, complaint, nearest, one_spelling, repr_of, run_config_file, settings_among)
from base.errors import BadInput
from base.files import ROOT, is_file, read_bytes, shown
from config import Options
from mixers import CODE_BYTES, layer_mixers, load_mixer_file
from tools.compare_arms import MUST_AGREE
from tools.sweep_runs import ASIDE
from tools.sweep_tuning import checked_grids
from tools.verdicts import LOOKS, MARGIN_BPB

CARD_BYTES = 2**16  # the largest card that is read; ours have less than 2**12
REMEDY = "see docs/claims.md"
NOT_OF_A_CARD = {  # options of train.py, and why a card does not set them
    "seed": "the looks say which seeds run",
    "holdout": "tuning runs have it, and the others may not",
    **dict.fromkeys(["out_dir", "resume", "overwrite", "other_data", "eval_only", "eval_split",
                     "keep_last", "device", "threads", "wandb_log", "wandb_project",
                     "wandb_run_name"], "it says nothing of the experiment"),
}

Text = Annotated[str, Field(min_length=1, max_length=4000)]
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9_][A-Za-z0-9_.+]*$", max_length=64)]
Looks = Annotated[list[Annotated[int, Field(ge=2, le=1000)]], Field(min_length=1, max_length=8)]


def plain(value):
    """An option's value as TOML and JSON have it. ValueError for what is none."""
    if isinstance(value, str) and len(value) <= 1000:
        return value
    if isinstance(value, (bool, int, float)) and -1e300 < value < 1e300:
        return value
    raise ValueError("no number, text of at most 1,000 characters, true or false")


Value = Annotated[Any, AfterValidator(plain)]
Grid = Annotated[list[Value], Field(min_length=2, max_length=32)]

class Strict(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)


class Arm(Strict):
    """What is compared: further keys are options of train.py."""
    model_config = ConfigDict(extra="allow")
    __pydantic_extra__: dict[str, Value]
    mixer: Text
    mixer_file: Optional[Text] = None
    prediction: Optional[Literal["better", "worse", "equivalent"]] = None
    beats_counting: bool = False  # confirmed only if also better than counted n-grams
    # times the baseline's; more refutes
    parameters_at_most: Optional[Annotated[float, Field(gt=0, le=1e9)]] = None

    @property
    def options(self):
        """{option of train.py: value}, but for mixer and mixer_file."""
        return self.model_extra


class Card(Strict):
    """A card, and the arms' words that confirm or refute its claim."""
    paper: Text
    claim: Text
    recipe: Text
    baseline: Name
    arms: Annotated[dict[Name, Arm], Field(min_length=2, max_length=32)]
    options: dict[str, Value] = {}  # of train.py, for all arms
    tune: dict[str, Grid] = {}
    tune_seeds: Annotated[int, Field(ge=1, le=100)] = 1  # see tools/sweep_tuning.py
    margin_bpb: Annotated[float, Field(gt=0, le=10)] = MARGIN_BPB
    looks: Looks = list(LOOKS)
    note: Annotated[str, Field(max_length=4000)] = ""

    def weights(self):
        """{seeds: share of the error that looking at so many may spend}."""
        if self.looks == list(LOOKS):
            return LOOKS
        return dict.fromkeys(self.looks, 1 / len(self.looks))

    def rivals(self):
        """The names of the arms that are compared with the baseline."""
        return [name for name in self.arms if name != self.baseline]

    def comparisons(self):
        """How many words the error is shared by."""
        return len(self.rivals()) + sum(self.arms[name].beats_counting for name in self.rivals())

    def options_of(self, name):
        """{option: value} that an arm is run with; files are still relative to the card."""
        arm = self.arms[name]
        options = {**self.options, **arm.options, "mixer": arm.mixer}
        if arm.mixer_file:
            options["mixer_file"] = arm.mixer_file
        return options


# Reading --------------------------------------------------------------------------------------

def read_card(path):
    """The Card in a file. BadInput, naming the key, if anything in it cannot be.

    What a mixer_file alone can tell, its mixers and their options, is not looked at."""
    path = Path(path)
    claim_name(path)
    content = read_bytes(path, CARD_BYTES, "name a card, claims/<name>.toml")
    try:
        values = tomllib.loads(content.decode())
    except (ValueError, RecursionError) as error:
        reason = "nested too deeply" if isinstance(error, RecursionError) else error
        raise BadInput(f"{shown(path)}: no valid TOML: {reason}; {REMEDY}") from error
    try:
        card = Card.model_validate(with_predictions(values))
        check_parts(card)
        check_all_options(card)
    except ValidationError as error:
        raise BadInput(f"{shown(path)}: {in_words(error)}; {REMEDY}") from error
    except BadInput as error:
        raise BadInput(f"{shown(path)}: {error}; {REMEDY}") from error
    return card


def claim_name(path):
    """causal_reduction of claims/causal_reduction.toml. BadInput if no folder can be called so."""
    if not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_-]{0,63}\.toml", Path(path).name):
        raise BadInput(f"{path} is no card; name a file claims/<name>.toml, the name of letters, "
                       "digits, _ and -")
    return Path(path).stem


def with_predictions(values):
    """A card's content with what stands in a table [prediction], arm = word, put into its arms."""
    predicted, arms = values.get("prediction"), values.get("arms")
    if not isinstance(predicted, dict) or not isinstance(arms, dict):
        return values
    arms = dict(arms)
    for name, word in predicted.items():
        if not isinstance(arms.get(name), dict):
            raise BadInput(f"prediction: no arm {name!r}{nearest(name, arms, '')}")
        if "prediction" in arms[name]:
            raise BadInput(f"arms.{name} and [prediction] both predict; leave one out")
        arms[name] = {**arms[name], "prediction": word}
    return {name: value for name, value in values.items() if name != "prediction"} | {"arms": arms}


def in_words(error):
    """The first complaint of a ValidationError, with the key's place in the card; that a key is not
    known before that another is missing."""
    details = error.errors(include_url=False)
    for detail in details:
        if detail["type"] == "extra_forbidden":
            key = str(detail["loc"][-1])
            return f"no key {repr_of(key)}{nearest(key, Card.model_fields, '')}"
    detail = details[0]
    place = [str(part) for part in detail["loc"] if part != "[key]"]
    if detail["loc"][-1:] == ("[key]",):
        return f"{'.'.join(place)}: a name is of letters, digits, _, . and +, at most 64"
    if detail["type"] == "missing":
        return f"{'.'.join(place)} is missing"
    message = detail["msg"].removeprefix("Value error, ")
    return f"{'.'.join(place)}: {message}, not {repr_of(detail['input'])}"


def check_parts(card):
    """BadInput if the parts of a card do not go together, whatever options there are."""
    if card.baseline not in card.arms:
        raise BadInput(f"baseline: no arm {card.baseline!r}{nearest(card.baseline, card.arms, '')}")
    if all(card.arms[name].prediction is None for name in card.rivals()):
        raise BadInput("no arm has a prediction, so nothing could confirm or refute the claim")
    of_baseline = card.arms[card.baseline]
    if of_baseline.prediction or of_baseline.beats_counting or of_baseline.parameters_at_most:
        raise BadInput(f"arms.{card.baseline}: it is the baseline, predict the others against it")
    if any(b <= a for a, b in zip(card.looks, card.looks[1:])):
        raise BadInput(f"looks: {card.looks} does not rise")


def check_all_options(card):
    """BadInput if options of a card are none, or not to be set there."""
    for name, arm in card.arms.items():
        check_options(card, f"arms.{name}", arm.options, arm)
        check_options(card, "options", card.options, arm)
        check_options(card, "tune", {name: grid[0] for name, grid in card.tune.items()}, arm)
    if not any(arm.mixer_file for arm in card.arms.values()):  # which may have options of its own
        checked_grids(card.tune)
    if card.options_of(card.baseline).get("allow_leak"):
        raise BadInput("the baseline is allowed to leak, and nothing can be said against it")


def check_options(card, place, options, arm):
    """BadInput for what is no option of train.py, not one of a card, or out of its range."""
    known = [f.name for f in fields(Options)]
    for name in options:
        if name in NOT_OF_A_CARD:
            raise BadInput(f"{place}.{name}: {NOT_OF_A_CARD[name]}; leave it out")
        if name in ("mixer", "mixer_file"):
            raise BadInput(f"{place}.{name}: an arm says its own; leave it out")
        if name not in known and not arm.mixer_file:
            near = nearest(OTHER_NAMES.get(name, name), known, "; train.py --help lists them")
            raise BadInput(f"{place}: no option {name!r}{near}")
        if place != "tune" and name in card.tune:
            raise BadInput(f"{place}.{name} is tuned; leave one out")
        if place != "options" and name in MUST_AGREE:
            raise BadInput(f"{place}.{name}: losses would not be of the same thing; "
                           "set it for all arms, in [options]")
    if arm.mixer_file:
        return
    try:
        layer_mixers(arm.mixer)
        Options(**options)
    except ValidationError as error:
        name, message = complaint(error)
        raise BadInput(f"{place}.{name}: {message}, not {repr_of(options[name])}") from error
    except (ValueError, OverflowError) as error:
        raise BadInput(f"{place}: {error}") from error


# Files that a card names ----------------------------------------------------------------------

def find_file(card_path, name, what):
    """The path of a file that a card names: from the folder that holds its folder claims/ (or from
    the card's own), or else from this repository. BadInput if there is none."""
    folder = Path(card_path).absolute().parent
    if folder.name == "claims":
        folder = folder.parent
    for path in (folder / name, ROOT / name):
        if is_file(path):
            return path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path
    raise BadInput(f"{shown(Path(card_path))}: {what}: {name} is not there; it is looked for in "
                   f"{shown(folder)}")


def arms_to_run(card_path, card):
    """{arm: {option: value}} with the files' paths. Runs the mixer files, so that their options are
    known; BadInput if they do not run."""
    arms = {}
    for name, arm in card.arms.items():
        arms[name] = card.options_of(name)
        if arm.mixer_file:
            path = find_file(card_path, arm.mixer_file, f"arms.{name}.mixer_file")
            load_mixer_file(str(path))
            arms[name]["mixer_file"] = str(path)
    return arms


def recipe_settings(path, card):
    """What a recipe sets for the arms of a card, name -> value, whatever it is called in it: not
    what the card tunes, what says nothing of the training, or what is of other mixers. BadInput if
    it does not run."""
    own = {one_spelling(arm.mixer) for arm in card.arms.values()}
    settings = decisive(run_config_file(path), card)
    per_mixer = settings.pop("per_mixer", {})
    for mixer, values in per_mixer.items() if isinstance(per_mixer, dict) else ():
        mixer = one_spelling(str(mixer))
        of_mixer = decisive(values, card) if isinstance(values, dict) else {}
        if mixer in own and of_mixer:
            settings[f"per_mixer {mixer}"] = of_mixer
    return json.loads(json.dumps(settings, sort_keys=True, default=repr_of))


def decisive(names, card):
    """Of {name: value}, what bears on the runs of a card."""
    return {name: value for name, value in settings_among(names).items()
            if name not in ASIDE and name not in card.tune}


def mixer_file_sums(card_path, card):
    """{arm: sha256 of its mixer file's content} of the arms that have one."""
    sums = {}
    for name, arm in card.arms.items():
        if arm.mixer_file:
            path = find_file(card_path, arm.mixer_file, f"arms.{name}.mixer_file")
            sums[name] = sha256(read_bytes(path, CODE_BYTES, "name a Python file")).hexdigest()
    return sums


def sha256_of(card, sums):
    """The checksum of what decides: all of a card but its texts, with mixer_file_sums in the place
    of the files' names."""
    content = card.model_dump(exclude={"paper", "claim", "note"}, exclude_defaults=True)
    content |= {"looks": card.looks, "margin_bpb": card.margin_bpb}  # were the defaults others
    for name, checksum in sums.items():
        content["arms"][name]["mixer_file"] = checksum
    return sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
