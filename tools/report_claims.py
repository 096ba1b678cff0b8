"""Claims in tools/report.py: what claim.json says (tools/claim.py), beside the runs of its arms.

The words are those that the claim found at its looks, each with its share of the error; judging
the same runs again, at one look, may give others.
"""
from typing import Annotated, Optional

from pydantic import Field

from base.files import read_json
from tools.claim_record import MEND, arm_of_run
from tools.score import Count, Lenient, Measured
from tools.verdicts import Verdict

OPEN = Verdict(0.0, word="undecided", missing="a first look")


class Card(Lenient):
    paper: str
    claim: str
    baseline: str
    margin_bpb: Annotated[float, Field(gt=0, le=10)]


class Word(Lenient):
    """A Verdict, as JSON has it."""
    word: str
    difference: Measured
    difference_low: Optional[Measured]
    difference_high: Optional[Measured]
    within_margin: bool
    missing: Optional[str]
    seeds: Count

    def verdict(self):
        return Verdict(**{name: getattr(self, name) for name in Word.model_fields})


class ArmFound(Lenient):
    prediction: Optional[str] = None
    against_baseline: Optional[Word] = None

    def verdict(self):
        return self.against_baseline.verdict() if self.against_baseline else OPEN


class Written(Lenient):
    revision: str
    clean: bool


class Claim(Lenient):
    """What the page says of claim.json."""
    card: Card
    card_sha256: str
    arms: dict[str, ArmFound]
    outcome: str
    written: Optional[Written] = None

    def name_arms(self, arms):
        """Gives Arms of the claim's records the names that the card gives them."""
        for arm in arms:
            arm.label = arm_of_run(arm.records[0].name)

    def verdicts(self, arms):
        """{label: Verdict} of Arms."""
        found = {}
        for arm in arms:
            found[arm.label] = self.arms.get(arm.label, ArmFound()).verdict()
            if arm.label == self.card.baseline:
                found[arm.label] = Verdict(0.0, word="baseline", seeds=len(arm.records))
        return found

    def sentence(self):
        """The claim, what became of it, and by what."""
        reasons = []
        for name, arm in self.arms.items():
            if name != self.card.baseline:
                reasons.append(reason(name, arm, self.card.baseline))
        outcome, card = self.outcome.capitalize(), self.card
        return f"{outcome}: {card.claim} ({card.paper}): {'; '.join(reasons)}."

    def provenance(self):
        found = {"checksum of the claim's card": self.card_sha256}
        if self.written:
            tree = "no changes to it" if self.written.clean else "with changes to it"
            found["revision of the code"] = f"{self.written.revision}, {tree}"
        return found


def reason(name, arm, baseline):
    """What was found of an arm, in words."""
    verdict = arm.verdict()
    text = f"{name} against {baseline} is {verdict.word}"
    if verdict.within_margin:
        text += " within the margin"
    if arm.prediction:
        text += f" (predicted: {arm.prediction})"
    if verdict.difference_low is not None:
        text += (f", {verdict.difference:+.4f} [{verdict.difference_low:+.4f}, "
                 f"{verdict.difference_high:+.4f}] nats, {verdict.seeds} seeds")
    return f"{text}, to decide it would take {verdict.missing}" if verdict.missing else text


def read_claim(folder):
    """The Claim of a folder. BadInput if it is damaged."""
    return read_json(folder / "claim.json", MEND, Claim)
