"""A paper's claim, from its card to a verdict. Run: python -m tools.claim claims/ssa.toml

    python -m tools.claim claims/ssa.toml claims/lln_diag.toml --dry_run    what it would cost
    python -m tools.claim --table                                           what came out, of all
    python -m tools.claim --table claims/ssa.toml

A card (docs/claims.md) says beforehand what is compared, on how many seeds, and which words confirm
or refute the claim. The command says what that costs, tunes every arm alike on text that is held
out of training, runs as many seeds as the first look has, and finds a word for each arm (see
tools/verdicts.py). Arms that are undecided go on to the next look, the others stop. Interrupted,
the same command goes on; runs that other sweeps and claims have finished are not made again.

results/claims/<name>/ then has the arms' records, and claim.json: the card and its checksum, the
revision of the code, and what was found. From then on that name stands for that card: a card that
has changed is a new claim and takes a new name. --table finds the words again from the records.
"""
import base.errors  # noqa: F401  before all others: Ctrl-C ends these quietly
import math
import sys
import time
from pathlib import Path
from typing import Optional

from base.command_line import parse_options
from base.errors import BadInput, exit_on_bad_input
from base.files import exists, read_json, shown, write_json
from base.options import checked, option
from base.terminal import is_terminal, wrapped
from tools.claim_cards import (
    arms_to_run, claim_name, find_file, mixer_file_sums, read_card, recipe_settings, sha256_of)
from tools.claim_outcomes import decide, findings, open_arms, outcome_of_claim
from tools.claim_record import (
    MEND, arm_of_run, arms_of, check_against_card, claimed, counting_of, folder_of, git_state,
    hours_of, read_claim_file, recorded, sizes_of)
from tools.claim_table import (
    difference_in_words, row_of_card, row_of_claim, table, table_for_terminal, together_in_words,
    verdict_in_words)
from tools.experiment import Experiment
from tools.records import scored_runs, write_records
from tools.sweep_runs import end_like_ctrl_c
from tools.sweep_tuning import is_tuning_seed

RUNS = Path("out/claims")
NEW_NAME = "a card that changes is a new claim: give it a new name"


@checked
class ClaimOptions:
    table: bool = option(
        False, "print the table of claims from their records, and run nothing; without cards, of "
        "all in results/claims")
    dry_run: bool = option(False, "only say what it would cost")
    max_hours: Optional[float] = option(
        None, "start no look that is expected to end later than this many hours from now", gt=0)
    at_once: Optional[int] = option(
        None, "runs at a time [default: as tools.sweep]", ge=1, le=4096)
    keep_checkpoints: bool = option(
        False, "keep those of the runs that are compared, for what else is to be asked of them")


# A claim --------------------------------------------------------------------------------------

class Claim:
    """A card, its runs and its record."""

    def __init__(self, path, at_once=None, keep_checkpoints=False):
        self.path = Path(path)
        self.name = claim_name(path)
        self.card = read_card(path)
        self.arms = arms_to_run(path, self.card)
        self.recipe = find_file(path, self.card.recipe, "recipe")
        self.at_once = at_once
        self.keep_checkpoints = keep_checkpoints
        self.folder = folder_of(self.name)
        sums = mixer_file_sums(path, self.card)
        self.content = {
            "claim": self.name,
            "card": self.card.model_dump(),
            "mixer_files": sums,
            "card_sha256": sha256_of(self.card, sums),
            "recipe_settings": recipe_settings(self.recipe, self.card),
            "registered": git_state(),
            "chosen": {}, "hours": {}, "counting": None, "sizes": {}, "arms": {},
            "outcome": "undecided",
        }
        if exists(self.folder / "claim.json"):
            self.go_on(read_claim_file(self.folder))

    def go_on(self, earlier):
        """Takes over what was found before. BadInput if that was of another card or recipe."""
        for key, what in (("card_sha256", self.path), ("recipe_settings", self.recipe)):
            if earlier[key] != self.content[key]:
                raise BadInput(f"{shown(what)} is not what {shown(self.folder)} began with: "
                               f"{NEW_NAME}, or put it back")
        self.content = earlier | {"card": self.content["card"]}  # whose texts may be others

    def experiment(self, names, deadline=math.inf, keep_checkpoints=False):
        """An Experiment of these arms, which starts no run beyond `deadline`, a monotonic time."""
        arms = {name: self.arms[name] for name in names}
        left = None if deadline == math.inf else max(1.0, deadline - time.monotonic()) / 3600
        return Experiment(RUNS / self.name, str(self.recipe), {}, arms, tune=self.card.tune or None,
                          at_once=self.at_once, max_hours=left, keep_checkpoints=keep_checkpoints,
                          tune_seeds=self.card.tune_seeds)

    def say_cost(self):
        """Prints what is still to be run to the first look and to the last. Returns the first's
        hours (None: not known)."""
        experiment = self.experiment(self.arms)
        looks = self.card.looks
        costs = [experiment.cost(seeds_of(look)) for look in (looks[0], looks[-1])]
        print(wrapped(
            f"{self.name}: to the first look, at {looks[0]} seeds: {costs[0]}; to the last, "
            f"at {looks[-1]}, if nothing is decided before: {costs[1]}"), flush=True)
        return costs[0].hours

    def tune(self, deadline):
        """Finds each arm's values, or takes those found before. Returns whether all have some."""
        if self.card.tune and not self.content["chosen"]:
            chosen = self.experiment(self.arms, deadline).tune()
            missing = [name for name in self.arms if name not in chosen]
            if missing:
                print(f"{self.name}: nothing to choose from for {', '.join(missing)}, see above; "
                      "the same command goes on")
                return False
            self.content["chosen"] = chosen
            self.write([])
        return True

    def carry_out(self, deadline):
        """Tunes, and runs look after look until no arm is open. Returns whether it came to its
        end: not if runs failed, or the next look would end beyond `deadline`, a monotonic time."""
        self.write([])
        if not self.tune(deadline):
            return False
        names = list(self.arms)
        records = {record.name: record for record in recorded(self.folder)}
        for look in self.card.looks:
            experiment = self.experiment(names, deadline, self.keep_checkpoints)
            if deadline < math.inf and not fits(experiment.cost(seeds_of(look)), deadline):
                print(f"{self.name}: the look at {look} seeds would not end in --max_hours; "
                      "the same command with more goes on")
                return False
            chosen = {name: self.content["chosen"].get(name, {}) for name in names}
            for record in experiment.run(chosen, seeds_of(look)):
                records[record.name] = record
            self.write(list(records.values()))
            by_arm = arms_of(records.values())
            if any(len(by_arm.get(name, {})) < look for name in names):
                print(f"{self.name}: runs are missing, see above; the same command goes on")
                return False
            decisions = decide(self.card, by_arm, self.content["counting"])
            self.say_words(names)
            names = [self.card.baseline, *open_arms(self.card, decisions)]
            if len(names) == 1:
                break
        if self.content["counting"] is None and any(
                arm.beats_counting for arm in self.card.arms.values()):
            print(f"{self.name}: what counting reaches on these data is not known; "
                  "see python -m tools.ngrams --help")
        print(f"{self.name}: {self.content['outcome']}; the record is in {shown(self.folder)}")
        return True

    def say_words(self, names):
        for name in names:
            arm = self.content["arms"][name]
            if name != self.card.baseline:
                look = arm["against_baseline"]["look"]
                words = f"{difference_in_words(arm):28} {verdict_in_words(arm)}"
                print(f"{look} seeds: {name:18} {words}", flush=True)

    def write(self, records):
        """Writes claim.json if it is not as it was, and these records and those that the tuning
        made."""
        if records:
            check_against_card(self.card, records)
            tuning = [record for record in scored_runs(RUNS / self.name)
                      if is_tuning_seed(record.config["seed"])
                      and arm_of_run(record.name) in self.arms]
            write_records(self.folder, [*tuning, *records])
            write_json(self.folder / "sweep.json",
                       {"runs": [record.name for record in records], "failed": {}})
            by_arm = arms_of(records)
            self.content["sizes"] = {name: sizes_of(own) for name, own in by_arm.items()}
            self.content["hours"] = hours_of(scored_runs(self.folder))
            self.content["counting"] = counting_of(records)
            self.content["arms"] = findings(
                self.card, by_arm, self.content["counting"], self.content["sizes"])
            self.content["outcome"] = outcome_of_claim(self.content["arms"])
        path = self.folder / "claim.json"
        earlier = read_json(path, MEND) if exists(path) else {}
        if earlier != self.content | {"written": earlier.get("written")}:
            self.content["written"] = git_state()
            write_json(path, self.content)


def seeds_of(look):
    return list(range(1, look + 1))


def fits(cost, deadline):
    return cost.hours is None or time.monotonic() + 3600 * cost.hours <= deadline


# The command ----------------------------------------------------------------------------------

def read_command_line(words):
    """(paths of cards, ClaimOptions), in any order."""
    paths = [word for word in words if word.endswith(".toml") and not word.startswith("-")]
    rest = [word for word in words if word not in paths]
    description = __doc__.splitlines()[0] + " Cards, claims/<name>.toml, come first."
    options, _, _ = parse_options(ClaimOptions, rest, description, with_config_file=False)
    of_runs = options.dry_run, options.max_hours, options.at_once, options.keep_checkpoints
    if options.table and any(of_runs):
        raise BadInput("--table runs nothing; leave the other options out")
    if not paths and not options.table:
        raise BadInput("which claim? name its card, claims/<name>.toml, or print --table")
    if len({claim_name(path) for path in paths}) < len(paths):
        raise BadInput("two cards have the same name; leave one out")
    return paths, options


def rows_of(paths):
    """The rows of the table, of these cards or of all claims that were run. BadInput if a card is
    not what its claim began with."""
    rows = []
    if not paths:
        rows = [row_of_claim(folder) for folder in claimed()]
    for path in paths:
        card, folder = read_card(path), folder_of(claim_name(path))
        if not exists(folder / "claim.json"):
            rows.append(row_of_card(card, "not run yet"))
        elif read_claim_file(folder)["card_sha256"] != sha256_of(card, mixer_file_sums(path, card)):
            raise BadInput(f"{path} is not what {shown(folder)} began with: {NEW_NAME}")
        else:
            rows.append(row_of_claim(folder))
    return rows


@exit_on_bad_input("tools.claim")
def main():
    end_like_ctrl_c()
    paths, options = read_command_line(sys.argv[1:])
    if options.table:
        show = table_for_terminal if is_terminal() else table
        print(show(rows_of(paths)))
        folders = [] if paths else claimed()
        if len(folders) > 1:
            print(f"\n{wrapped(together_in_words(folders))}")
        return
    claims = [Claim(path, options.at_once, options.keep_checkpoints) for path in paths]
    hours = [claim.say_cost() for claim in claims]
    if options.dry_run:
        return
    limit = options.max_hours or math.inf
    if sum(filter(None, hours)) > limit:
        raise BadInput(f"the first looks take {sum(filter(None, hours)):.1f} hours, more than "
                       f"--max_hours={limit:g}; raise it, or name fewer cards")
    deadline = time.monotonic() + 3600 * limit
    ended = [claim.carry_out(deadline) for claim in claims]
    sys.exit(0 if all(ended) else 1)


if __name__ == "__main__":
    main()
