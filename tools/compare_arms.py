"""The runs that tools/compare.py compares, by what they have in common: an arm is a mixer with its
options, over the seeds."""
import json
from dataclasses import asdict, dataclass
from functools import cache
from statistics import mean, median

from base.errors import BadInput
from config import Options, filled_in
from tools.sweep_runs import ASIDE
from tools.sweep_tuning import is_tuning_seed
from tools.verdicts import judge
from training.run_folder import NOT_OPTIONS

MUST_AGREE = ("dataset", "block_size", "eval_tokens")  # or the losses are not of the same thing
# what says nothing of how a run was trained, or is compared in another way
NOT_COMPARED = ASIDE | NOT_OPTIONS | {"mixer", "seed"}
OF_THE_RATE = {"learning_rate", "min_lr"}  # the second follows from the first


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

    @property
    def diverged(self):
        """How many of its runs did: they count with the loss of an even guess."""
        return sum(is_diverged(record) for record in self.records)

    @property
    def steady(self):
        """The first of its records that did not diverge, or the first."""
        return next((record for record in self.records if not is_diverged(record)),
                    self.records[0])

    def reported(self, key):
        """That figure on the report data, one for each seed."""
        return [record.scores["report"][key] for record in self.records]

    def final_val_losses(self):
        return [final_val_loss(record) for record in self.records]

    def block_losses(self, blocks):
        """{seed: losses of so many blocks of text, in nats}."""
        return {seed_of(record): block_losses(record, blocks) for record in self.records}

    def steps_to(self, accuracy):
        """The steps after which each seed's accuracy on the validation split was first that high,
        None where it never was; [] of a text."""
        steps = []
        for record in self.records:
            rows = [row for row in record.metrics if row.get("val_accuracy") is not None]
            if rows:
                reached = [row["iter"] for row in rows if row["val_accuracy"] >= accuracy]
                steps.append(min(reached, default=None))
        return steps

    def beyond(self, stretch):
        """The mean loss, in nats, in that stretch of windows longer than those trained on, see
        tools/score.py; None if a run has none."""
        losses = [record.scores.get("beyond") for record in self.records]
        return None if None in losses else mean(of_run[stretch] for of_run in losses)

    def measured(self, key, choose):
        """The median over the seeds of choose(that figure of all rows of a run), or None."""
        of_runs = []
        for record in self.records:
            values = [row[key] for row in record.metrics if row.get(key) is not None]
            if values:
                of_runs.append(choose(values))
        return median(of_runs) if of_runs else None


def is_diverged(record):
    return bool(record.scores.get("diverged"))


def is_tuning(record):
    """Whether a scored run was made to choose options by: of a text, with a slice held out of
    training; of a recall task, with a seed to tune by."""
    is_recall = (record.scores["report"] or {}).get("accuracy") is not None
    return is_held_out(record) or (is_recall and is_tuning_seed(seed_of(record)))


def is_held_out(record):
    return record.config.get("holdout", 0) > 0


def final_val_loss(record):
    if is_diverged(record):
        return record.scores["report"]["loss"]
    return [row["val_loss"] for row in record.metrics if row.get("val_loss") is not None][-1]


def block_losses(record, blocks):
    """The losses of so many blocks of text, in nats; blocks 1: the report loss alone."""
    if blocks == 1 or is_diverged(record):
        return [record.scores["report"]["loss"]] * blocks
    return record.scores["by_block"]


def block_count(records):
    """How many blocks of text the runs were scored on; 1 if these are not known: of a recall task,
    or scored by an earlier version. BadInput if they are not the same for all."""
    counts = {len(record.scores.get("by_block") or ()) for record in records
              if not is_diverged(record)}
    if len(counts) > 1:
        raise BadInput("the runs were scored on different parts of the validation text (earlier "
                       "versions took its second half): compare those of one version")
    return max({1} | counts)


def judge_arms(arms, baseline, margin=None, comparisons=None):
    """{label: Verdict}; margin in nats, comparisons as for judge. What leaks has no word: its
    losses say nothing, and it is no comparison that the others share the error with."""
    blocks = block_count([record for arm in arms for record in arm.records])
    losses = {arm.label: arm.block_losses(blocks) for arm in arms}
    leaking = [arm.label for arm in arms if arm.leaks and arm.label != baseline]
    honest = {label: of_arm for label, of_arm in losses.items() if label not in leaking}
    verdicts = judge(honest, baseline, margin, comparisons)
    for label in leaking:
        alone = judge({label: losses[label], baseline: losses[baseline]}, baseline)[label]
        alone.word, alone.missing = "leaks", None
        verdicts[label] = alone
    return verdicts


def setting(record, option_name):
    """An option's value as JSON; a run from before there was the option has its default."""
    config = record.config
    if option_name in config:
        return json.dumps(config[option_name])
    arch = "llama" if config.get("arch") == "llama" else "gpt2"
    return json.dumps(defaults(arch).get(option_name))


@cache
def defaults(arch):
    """Every option's default, {name: value}."""
    return asdict(filled_in(Options(arch=arch)))


def arms_of(records):
    """The runs by mixer and options, a list of Arm, sorted. BadInput if their losses are not of
    the same thing, or a run is there twice."""
    unequal = unequal_options(records)
    check_alike(records, unequal)
    arms = grouped(records, unequal)
    for arm in arms:
        arm.records.sort(key=seed_of)
        check_seeds(arm.records)
    return arms


def tuning_arms_of(records):
    """Tuning runs by mixer and options other than the learning rate, a list of Arm, sorted; the
    records of each by learning rate."""
    if not records:
        return []
    unequal = [name for name in unequal_options(records) if name not in OF_THE_RATE]
    arms = grouped(records, unequal)
    for arm in arms:
        arm.records.sort(key=rate_of)
    return arms


def grouped(records, unequal):
    """The runs by mixer and the options named `unequal`, a sorted list of Arm with labels."""
    arms = {}
    for record in records:
        settings = {name: setting(record, name) for name in unequal}
        key = record.config["mixer"], *settings.values()
        arms.setdefault(key, Arm(record.config["mixer"], settings, [])).records.append(record)
    arms = [arms[key] for key in sorted(arms)]
    for arm in arms:
        arm.label = label_of(arm, arms)
    return arms


def rate_of(record):
    return record.config["learning_rate"]


def seed_of(record):
    return record.config["seed"]


def unequal_options(records):
    """The names of the options that are not the same for all."""
    names = []
    for name in dict.fromkeys(name for record in records for name in record.config):
        if name in NOT_COMPARED:
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
    check_data_alike(records)
    block_count(records)
    scored = [record for record in records if not is_diverged(record)]
    cells = {frozenset(record.scores["by_cell"] or ()) for record in scored}
    positions = {len(record.scores["by_position"] or ()) for record in scored}
    if len(cells) > 1 or len(positions) > 1:
        raise BadInput("the runs were scored on rows of different lengths, as learned positions "
                       "end at block_size: compare those with learned positions apart from those "
                       "without")


def check_data_alike(records):
    """BadInput if data sets of one name were others. Older records do not say which they were."""
    first = {}
    for record in records:
        sha256 = record.config.get("data_sha256")
        if sha256 is not None:
            first.setdefault(json.dumps(sha256), record)
    if len(first) > 1:
        one, other, *_ = first.values()
        raise BadInput(f"{one} and {other} were trained on other data of the same name: "
                       "their losses are not of the same thing")


def check_seeds(records):
    """BadInput if two of an arm's records, which are sorted by seed, have the same."""
    for one, other in zip(records, records[1:]):
        if seed_of(one) == seed_of(other):
            raise BadInput(f"{one} and {other} are the same run twice, seed {seed_of(one)}; "
                           "leave one out")


def label_of(arm, arms):
    """The mixer's name, and the options in which the arms of that mixer differ; the learning rate
    only where nothing else tells them apart, as each may have its own."""
    same = [other for other in arms if other.mixer == arm.mixer]
    every = [name for name in arm.settings if len({other.settings[name] for other in same}) > 1]
    without = [name for name in every if name not in OF_THE_RATE]
    rate_alone = [name for name in every if name != "min_lr"]
    for names in (without, rate_alone, every):
        if len({tuple(other.settings[name] for name in names) for other in same}) == len(same):
            break
    values = [f"{name}={without_quotes(arm.settings[name])}" for name in names]
    return " ".join([arm.mixer.replace(",", "+"), *values])


def without_quotes(value):
    """An option's value, JSON, as a label has it."""
    read = json.loads(value)
    return read if isinstance(read, str) and read else value
