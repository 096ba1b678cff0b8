"""The runs that tools/compare.py compares, by what they have in common: an arm is a mixer with its
options, over the seeds."""
import json
from dataclasses import dataclass
from statistics import median

from base.errors import BadInput
from tools.sweep_runs import ASIDE

MUST_AGREE = ("dataset", "block_size", "eval_tokens")  # or the losses are not of the same thing


@dataclass
class Arm:
    """The runs of one mixer with the same options, over the seeds."""
    mixer: str
    settings: dict    # {option: its value as JSON} of those that are not equal among all the runs
    records: list     # of Record, by seed
    label: str = ""   # the mixer, and what tells it apart from other arms of that mixer

    @property
    def config(self):
        return self.records[0].config

    @property
    def leaks(self):
        return bool(self.config.get("allow_leak"))

    def reported(self, key):
        """That figure on the report data, one for each seed."""
        return [record.scores["report"][key] for record in self.records]

    def final_val_losses(self):
        return [last_val_loss(record.metrics) for record in self.records]

    def measured(self, key, choose):
        """The median over the seeds of choose(that figure of all rows of a run), or None."""
        of_runs = []
        for record in self.records:
            values = [row[key] for row in record.metrics if row.get(key) is not None]
            if values:
                of_runs.append(choose(values))
        return median(of_runs) if of_runs else None


def last_val_loss(metrics):
    return [row["val_loss"] for row in metrics if row.get("val_loss") is not None][-1]


def setting(record, option_name):
    """An option's value as JSON."""
    return json.dumps(record.config.get(option_name))


def arms_of(records):
    """The runs by mixer and options, a list of Arm, sorted. BadInput if their losses are not of
    the same thing, or a run is there twice."""
    unequal = unequal_options(records)
    check_alike(records, unequal)
    arms = []
    for record in records:
        mixer = record.config["mixer"]
        settings = {name: setting(record, name) for name in unequal}
        for arm in arms:
            if (arm.mixer, arm.settings) == (mixer, settings):
                arm.records.append(record)
                break
        else:
            arms.append(Arm(mixer, settings, [record]))
    arms.sort(key=mixer_and_settings)
    for arm in arms:
        arm.label = label_of(arm, arms)
        arm.records.sort(key=seed_of)
        check_seeds(arm.records)
    return arms


def mixer_and_settings(arm):
    return arm.mixer, list(arm.settings.values())


def seed_of(record):
    return record.config["seed"]


def unequal_options(records):
    """The names of the options that are not the same for all."""
    names = []
    for name in records[0].config:
        if name in ASIDE or name in ("mixer", "seed"):
            continue
        if len({setting(record, name) for record in records}) > 1:
            names.append(name)
    return names


def check_alike(records, unequal):
    """BadInput if the losses of the records are not of the same thing."""
    for name in MUST_AGREE:
        if name in unequal:
            values = ", ".join(sorted({setting(record, name) for record in records}))
            raise BadInput(f"the runs differ in {name} ({values}): "
                           "their losses are not of the same thing")
    cells = {frozenset(record.scores["by_cell"] or ()) for record in records}
    positions = {len(record.scores["by_position"] or ()) for record in records}
    if len(cells) > 1 or len(positions) > 1:
        raise BadInput("the runs were scored on rows of different lengths, as learned positions "
                       "end at block_size: compare those with learned positions apart from those "
                       "without")


def check_seeds(records):
    """BadInput if two of an arm's records, which are sorted by seed, have the same."""
    for one, other in zip(records, records[1:]):
        if seed_of(one) == seed_of(other):
            raise BadInput(f"{one} and {other} are the same run twice, seed {seed_of(one)}; "
                           "leave one out")


def label_of(arm, arms):
    """The mixer's name, and the options in which the arms of that mixer differ."""
    words = [arm.mixer.replace(",", "+")]
    for name, value in arm.settings.items():
        if any(other.mixer == arm.mixer and other.settings[name] != value for other in arms):
            words.append(f"{name}={value}")
    return " ".join(words)
