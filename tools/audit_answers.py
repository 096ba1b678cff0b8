"""An audit's answers: what was asked, the number, what it means, the smallest failing input;
printed and written as JSON. Of tools/audit_hf.py, audit_module.py and audit_metric.py.
"""
import math
import sys
from dataclasses import asdict, dataclass
from typing import Any, Optional

import torch

from base.errors import BadInput, printable
from base.files import write_json

VERDICT = {True: "pass", False: "FAIL", None: "n/a"}
# question -> what a FAIL means, and what to look at
MEANING = {
    "suffix": "an output depends on a later token: losses are too low, and sampling cannot repeat "
              "them; look at the mask and at sums, norms and shifts over time",
    "gradient": "an output's gradient reaches a later token: the same, where values hide it; look "
                "at what is detached, cancelled or clamped rather than masked",
    "rows": "an output depends on another sequence of the batch: a loss depends on its neighbours; "
            "look at norms, capacities and reshapes over the batch",
    "repeat": "the same call gives another output: look for randomness in evaluation, and for "
              "state that a call leaves in the module",
    "length": "an output depends on how long the sequence is: sampling differs from training; look "
              "at what is divided or scaled by the length, and at padding to a block",
    "train": "the same as for suffix, but in training mode",
    "one": "a sequence alone gives another output than within a batch: look at what depends on the "
           "batch's size",
}


@dataclass
class Answer:
    """To one question. passed None: there is nothing to judge, `figures` says why, and word
    stands in a table in place of n/a.

    size and limit: the difference found and the most there may be, as shares of the largest logit.
    smallest: the shortest input that was found to fail. where: the module and its file."""
    question: str
    passed: Optional[bool]
    figures: str
    size: Optional[float] = None
    limit: Optional[float] = None
    smallest: Optional[dict[str, Any]] = None
    where: str = ""
    word: str = ""

    @property
    def verdict(self):
        return self.word if self.passed is None and self.word else VERDICT[self.passed]

    @property
    def meaning(self):
        return MEANING.get(self.question, "") if self.passed is False else ""


def judged(question, size, most, smallest=None, where="", meanwhile=""):
    """The Answer to a question from the size that was found."""
    figures = f"{size:.0e} of the largest logit, limit {most:.0e}{meanwhile}"
    if smallest:
        figures += "; smallest: " + ", ".join(f"{k} {v}" for k, v in smallest.items())
    if where:
        figures += f"; first in {where}"
    size = size if math.isfinite(size) else None
    return Answer(question, smallest is None, figures, size, most, smallest, where)


def print_answer(answer):
    print(f"{answer.question:9} {answer.verdict:6} {printable(answer.figures)}", flush=True)
    if answer.meaning:
        print(f"{'':15}{answer.meaning}", flush=True)


def report(name, found, seconds, path):
    """Prints the verdict, writes the answers as JSON beside it. Returns whether all passed."""
    failed = [answer.question for answer in found if answer.passed is False]
    rows = [asdict(answer) | {"meaning": answer.meaning} for answer in found]
    content = dict(audited=name, passed=not failed, seconds=round(seconds, 1),
                   torch=torch.__version__, answers=rows)
    try:
        write_json(path, content)
        where = f", report in {path}"
    except BadInput as error:
        print(f"tools.audit: warning: no report, {error}", file=sys.stderr)
        where = ""
    verdict = f"FAIL ({', '.join(failed)})" if failed else "pass"
    print(printable(f"{name}: {verdict}, {seconds:.1f} s{where}"), flush=True)
    return not failed
