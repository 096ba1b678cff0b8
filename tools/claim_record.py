"""What stays of a claim: results/claims/<name>/claim.json, and the records of its runs beside it.

What is read back may be from anybody: sizes are limited, and the records are checked against the
card.
"""
import subprocess
from typing import Annotated, Any, Optional

from pydantic import Field, ValidationError

from base.command_line import one_spelling
from base.errors import BadInput, printable
from base.files import ROOT, exists, read_json, shown
from tools import records
from tools.claim_cards import Card, check_parts, sha256_of
from tools.compare_arms import check_alike, unequal_options
from tools.compare_table import build, model_config_of
from tools.ngrams import reference_lines
from tools.records import Lenient, read_records
from tools.score import DTYPES
from tools.sweep_runs import ASIDE

MEND = "run the claim once more, or get its folder anew"


class Sizes(Lenient):
    parameters: Annotated[int, Field(ge=1)]
    state_bytes: Optional[int]


class WordFound(Lenient):
    word: str


class ArmFound(Lenient):
    against_baseline: Optional[WordFound] = None
    against_counting: Optional[WordFound] = None
    outcome: Optional[str] = None


class ClaimFile(Lenient):
    """claim.json, as far as the records beside it do not say it again."""
    card: dict[str, Any]
    mixer_files: dict[str, str]
    card_sha256: str
    recipe_settings: dict[str, Any]
    chosen: dict[str, dict[str, Any]]
    hours: dict[str, Annotated[float, Field(ge=0, le=1e9)]]
    counting: Optional[Annotated[float, Field(ge=0, le=1e9)]]
    sizes: dict[str, Sizes]
    arms: dict[str, ArmFound]
    outcome: str


def folder_of(name):
    """Where the record of a claim is."""
    return records.RESULTS / "claims" / name


def claimed():
    """The folders of all claims that were run, sorted."""
    return sorted(path.parent for path in (records.RESULTS / "claims").glob("*/claim.json"))


def read_claim_file(folder):
    """The content of a folder's claim.json (dict). BadInput if it is damaged."""
    return read_json(folder / "claim.json", MEND, ClaimFile).model_dump(exclude_unset=True)


def card_in(content, folder):
    """The Card in a claim.json. BadInput if it is none, or not the one of the checksum."""
    try:
        card = Card.model_validate(content["card"])
        check_parts(card)
        if sha256_of(card, content["mixer_files"]) == content["card_sha256"]:
            return card
    except (ValidationError, BadInput, KeyError):
        pass
    raise BadInput(f"{shown(folder)}/claim.json is damaged: its card is not that of its checksum; "
                   f"{MEND}")


def git_state():
    """{"revision", "clean"} of this repository, results aside, or None if git cannot tell."""
    try:
        revision = git("rev-parse", "HEAD")
        changed = git("status", "--porcelain", "--untracked-files=no", "--",
                      ".", ":(exclude)results")
    except (OSError, subprocess.CalledProcessError):
        return None
    return {"revision": revision, "clean": not changed}


def git(*words):
    done = subprocess.run(["git", "-C", str(ROOT), *words], capture_output=True, text=True,
                          check=True)
    return done.stdout.strip()


# Records --------------------------------------------------------------------------------------

def arm_of_run(name):
    """softmax of softmax-learning_rate0.003-seed1: an arm's name has no hyphen."""
    return name.partition("-")[0]


def arms_of(records):
    """{arm: {seed: Record}}."""
    arms = {}
    for record in records:
        arms.setdefault(arm_of_run(record.name), {})[record.config["seed"]] = record
    return arms


def check_against_card(card, records):
    """BadInput if a record is not of one of the card's arms, or losses are not of the same
    thing."""
    for record in records:
        name = arm_of_run(record.name)
        if name not in card.arms or record.scores is None or record.scores["report"] is None:
            raise BadInput(f"{record} is no scored run of an arm of the claim; {MEND}")
        for key, value in card.options_of(name).items():
            ran = record.config.get(key)
            if key == "mixer":
                value, ran = one_spelling(value), one_spelling(ran)
            if ran != value and value != "auto" and key not in ASIDE:  # mixer_file is among these
                raise BadInput(f"{record} was run with {key} {printable(str(ran))[:60]}, and the "
                               f"card says {value}; {MEND}")
    check_alike(records, unequal_options(records))


def sizes_of(records):
    """{"parameters", "state_bytes"} of an arm's model, records {seed: Record}; the state is that of
    one sequence of the trained length."""
    record = next(iter(records.values()))
    config = model_config_of(record)
    model = build(config, record)
    return {
        "parameters": sum(p.numel() for p in model.parameters()),
        "state_bytes": model.state_bytes(config.block_size, DTYPES[record.config["dtype"]]),
    }


def hours_of(records):
    """{arm: hours of training}, tuning included, as the machines were then."""
    hours = {}
    for record in records:
        name = arm_of_run(record.name)
        hours[name] = hours.get(name, 0.0) + record.seconds() / 3600
    return hours


def counting_of(records):
    """What counting reaches on the data that the Records' reports are of, in nats per token, or
    None."""
    for record in records:
        lines = reference_lines(record.config, record.scores)
        if lines:
            return min(lines.values())
    return None


def recorded(folder):
    """The Records that a claim's folder has."""
    return read_records(folder) if exists(folder / "sweep.json") else []
