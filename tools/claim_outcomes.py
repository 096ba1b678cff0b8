"""What the records of a claim's runs say: the word of each arm at each look, and whether that
confirms or refutes what its card predicts.

Nothing here trains or is decided by hand: the words follow from the card and the records alone, so
that tools.claim --table finds them again.
"""
from dataclasses import asdict, dataclass
from statistics import mean
from typing import Optional

from tools.compare_arms import block_count, block_losses, is_diverged
from tools.verdicts import Verdict, judge, margin_in_nats

OPEN = ("undecided", "one seed")
COUNTING = "counting"  # as a baseline: what counted n-grams lose, or a guess


@dataclass
class Word:
    """A Verdict, and the look that found it."""
    verdict: Verdict
    look: int  # seeds that were to be looked at

    @property
    def is_open(self):
        return self.verdict.word in OPEN


@dataclass
class Decision:
    """What is known of an arm; None: no look was reached."""
    against_baseline: Optional[Word] = None
    against_counting: Optional[Word] = None  # where the card asks for it

    def is_open(self, arm):
        """Whether more seeds are wanted of an Arm of a card."""
        words = [self.against_baseline]
        if arm.beats_counting:
            words.append(self.against_counting)
        return any(word is None or word.is_open for word in words)


def decide(card, records, counting=None, cards=1):
    """{arm: Decision} of a Card, look after look as far as the records reach.

    cards: how many are to share one error.
    records: {arm: {seed: Record}}; counting: nats per token that counting reaches, or None. An arm
    that is decided at a look is not looked at again: what has run beyond says nothing more."""
    decisions = {name: Decision() for name in card.rivals()}
    of_baseline = records.get(card.baseline, {})
    for look, weight in card.weights().items():
        baseline = up_to(of_baseline, look)
        for name, decision in decisions.items():
            own = up_to(records.get(name, {}), look)
            if baseline and own and decision.is_open(card.arms[name]):
                look_at(card, name, decision, own, baseline, counting, look, weight / cards)
    return decisions


def up_to(records, look):
    """{seed: Record} of the seeds 1 to `look`; {} if one is missing."""
    seeds = range(1, look + 1)
    if not all(seed in records for seed in seeds):
        return {}
    return {seed: records[seed] for seed in seeds}


def look_at(card, name, decision, own, baseline, counting, look, weight):
    """Finds the words of an arm, whose records and the baseline's are given, that are still
    open."""
    m = card.comparisons()
    if decision.against_baseline is None or decision.against_baseline.is_open:
        blocks = block_count([*own.values(), *baseline.values()])
        margin = margin_in_nats(card.margin_bpb, baseline[1].scores)
        losses = {name: losses_of(own, blocks), card.baseline: losses_of(baseline, blocks)}
        found = judge(losses, card.baseline, margin, m, weight)[name]
        if any(record.config.get("allow_leak") for record in own.values()):
            found = Verdict(found.difference, word="leaks", seeds=found.seeds)
        decision.against_baseline = Word(found, look)
    known = decision.against_counting
    if card.arms[name].beats_counting and counting is not None and (not known or known.is_open):
        losses = {name: losses_of(own, 1), COUNTING: dict.fromkeys(own, [counting])}
        found = judge(losses, COUNTING, None, m, weight)[name]
        decision.against_counting = Word(found, look)


def losses_of(records, blocks):
    """{seed: losses of so many blocks} of {seed: Record}."""
    return {seed: block_losses(record, blocks) for seed, record in records.items()}


def open_arms(card, decisions):
    """The names of the arms that more seeds are wanted of."""
    return [name for name, decision in decisions.items() if decision.is_open(card.arms[name])]


# Against the prediction -----------------------------------------------------------------------

def outcome_of_word(prediction, verdict):
    """confirmed, refuted, undecided or leaks. Better or worse within the margin is also
    equivalent."""
    if verdict.word in OPEN:
        return "undecided"
    if verdict.word == "leaks":
        return "leaks"
    if verdict.word == prediction or (prediction == "equivalent" and verdict.within_margin):
        return "confirmed"
    return "refuted"


def outcome_of_arm(arm, decision, times_parameters):
    """That of an Arm of a card, None if it predicts nothing; times_parameters: those of the
    baseline that it has."""
    if arm.prediction is None:
        return None
    if decision.against_baseline is None:
        return "undecided"
    outcomes = [outcome_of_word(arm.prediction, decision.against_baseline.verdict)]
    if arm.beats_counting:
        word = decision.against_counting
        outcomes.append(outcome_of_word("better", word.verdict) if word else "undecided")
    if arm.parameters_at_most is not None:
        within = times_parameters <= arm.parameters_at_most
        outcomes.append("confirmed" if within else "refuted")
    return together(outcomes)


def together(outcomes):
    """Refuted if one is, confirmed if all are; what leaks is neither."""
    for outcome in ("refuted", "leaks", "undecided"):
        if outcome in outcomes:
            return outcome
    return "confirmed"


# As claim.json has it -------------------------------------------------------------------------

def findings(card, records, counting, sizes, cards=1):
    """The arms' part of a claim's record: {arm: {...}}, the baseline's first. sizes: {arm:
    {"parameters", "state_bytes"}}; cards: as for decide."""
    decisions = decide(card, records, counting, cards)
    found = {}
    for name in [card.baseline, *card.rivals()]:
        own = list(records.get(name, {}).values())
        found[name] = {
            **sizes.get(name, {}),
            "runs": len(own),
            "diverged": sum(is_diverged(record) for record in own),
            "loss": mean_of(own, "loss"),
            "accuracy": mean_of(own, "accuracy"),
        }
    for name, decision in decisions.items():
        arm = card.arms[name]
        times = times_parameters(sizes, name, card.baseline)
        found[name] |= {
            "prediction": arm.prediction,
            "against_baseline": word_as_json(decision.against_baseline),
            "against_counting": word_as_json(decision.against_counting),
            "outcome": outcome_of_arm(arm, decision, times),
        }
    return found


def mean_of(records, key):
    """The mean of a figure of the report, or None if one has none."""
    values = [record.scores["report"][key] for record in records]
    return None if not values or None in values else mean(values)


def times_parameters(sizes, name, baseline):
    """How many times the baseline's parameters an arm has; infinitely many while not known."""
    if name not in sizes or baseline not in sizes:
        return float("inf")
    return sizes[name]["parameters"] / sizes[baseline]["parameters"]


def word_as_json(word):
    return None if word is None else {**asdict(word.verdict), "look": word.look}


def outcome_of_claim(found):
    """Of all arms that predict something, {arm: part of a claim's record}."""
    return together([arm["outcome"] for arm in found.values() if arm.get("outcome")])
