"""Whether losses over seeds differ from a baseline's: Welch's t-test, adjusted by Holm's method."""
from dataclasses import dataclass
from statistics import mean, stdev
from typing import Optional

import numpy as np
from scipy import stats

SIGNIFICANT = 0.05


@dataclass
class Verdict:
    """Of an arm against the baseline, in nats: the distance of the means, its 95 % interval by
    Welch, p adjusted by Holm; None where there is one seed."""
    difference: float
    difference_low: Optional[float] = None
    difference_high: Optional[float] = None
    p: Optional[float] = None
    verdict: str = "one seed"


def interval(values):
    """Half the width of the 95 % interval of a mean, by Student's t; None of a single value."""
    n = len(values)
    if n < 2:
        return None
    return stats.t.ppf(0.975, n - 1) * stdev(values) / n**0.5


def holm(p):
    """Holm's adjustment of {name: p value}: that of the k-th smallest of n is multiplied by
    n - k + 1, and none falls below one before it."""
    adjusted, largest = {}, 0.0
    for k, name in enumerate(sorted(p, key=p.get)):
        largest = max(largest, min(1.0, p[name] * (len(p) - k)))
        adjusted[name] = largest
    return adjusted


def welch_tests(losses, baseline):
    """{label: scipy's result} of those that have several seeds, and not of the baseline."""
    tests = {}
    for label, values in losses.items():
        if label != baseline and len(values) > 1 and len(losses[baseline]) > 1:
            tests[label] = stats.ttest_ind(values, losses[baseline], equal_var=False)
    return tests


def judge(losses, baseline):
    """{label: Verdict} of {label: losses of the seeds}."""
    tests = welch_tests(losses, baseline)
    p = {}
    for label, test in tests.items():
        p[label] = test.pvalue if np.isfinite(test.pvalue) else 1.0  # no spread, no difference
    p = holm(p)
    verdicts = {}
    for label, values in losses.items():
        verdict = Verdict(mean(values) - mean(losses[baseline]))
        if label in tests:
            verdict.p = p[label]
            low, high = tests[label].confidence_interval()
            verdict.difference_low, verdict.difference_high = low, high
            verdict.verdict = word(verdict)
        verdicts[label] = verdict
    verdicts[baseline].verdict = "baseline"
    return verdicts


def word(verdict):
    if verdict.p >= SIGNIFICANT:
        return "inside the seed noise"
    return "better" if verdict.difference < 0 else "worse"
