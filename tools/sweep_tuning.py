"""The search for the best values of some options, alike for every arm.

All arms begin with the same grid. Where the best value is the smallest or the largest that was
tried, the grid is extended beyond it by its own factor of growth, until the best one has worse
neighbours on both sides. With one seed each, chance chooses between values that are nearly as good,
or do well with some seeds alone. With more, a value is as good as its mean over the seeds it was
tried with, and the search ends when the best two were tried with all of them.
"""
import itertools
import math
from dataclasses import fields
from statistics import mean

from pydantic import ValidationError

from base.command_line import from_text, nearest_option, one_line
from base.errors import BadInput
from config import Options
from tools.sweep_runs import ASIDE

MOST_EXTENSIONS = 4  # on each side of an option's grid
MOST_POINTS = 1000   # of all grids together
FINALISTS = 2        # values that further seeds decide between
LATER_SEEDS = 10**6  # seeds to tune by are 0, and from here on
DIVERGED = 1e30      # the loss in a search: an even guess may be better than a poor model
NOT_TUNABLE = ASIDE | {"mixer", "seed", "dataset", "holdout", "eval_tokens", "allow_leak"}


def tuning_seeds(count):
    """So many seeds to tune by, which are never reported."""
    return [0, *range(LATER_SEEDS, LATER_SEEDS + count - 1)]


def is_tuning_seed(seed):
    return seed == 0 or seed >= LATER_SEEDS


# Grids --------------------------------------------------------------------------------------------

def grids_in(text):
    """{option: [value]} of "learning_rate=1e-3,2e-3 dropout=0,0.1". BadInput for what is none."""
    kinds = {f.name: f.type for f in fields(Options)}
    grids = {}
    for word in text.split():
        name, equals, values = word.partition("=")
        if not equals:
            raise BadInput(f"--tune={text}: {word!r} is not option=value,value")
        if name not in kinds:
            raise BadInput(f"--tune={text}: no option {name!r}{nearest_option(name, kinds)}")
        if name in grids:
            raise BadInput(f"--tune={text}: {name} is there twice; leave one out")
        try:
            grids[name] = [from_text(value, kinds[name]) for value in values.split(",")]
        except ValueError as error:
            raise BadInput(f"--tune={text}: {name}: {one_line(error)}") from error
    return grids


def checked_grids(grids):
    """The grids {option: [value]} to begin with, numbers ascending. BadInput for an option that is
    none or not to be tuned, and for values that are not its own or too few."""
    known = [f.name for f in fields(Options)]
    result = {}
    for option, values in grids.items():
        if option not in known:
            raise BadInput(f"tune: no option {option!r}{nearest_option(option, known)}")
        if option in NOT_TUNABLE:
            raise BadInput(f"tune: {option} is not to be tuned; it changes what is compared, or "
                           "nothing at all")
        result[option] = checked_grid(option, values)
    if math.prod(len(values) for values in result.values()) > MOST_POINTS:
        raise BadInput(f"tune: more than {MOST_POINTS} combinations; leave some values out")
    return result


def checked_grid(option, values):
    place = f"tune: {option}={','.join(map(str, values))}"
    for value in values:
        complaint = complaint_on(option, value)
        if "/" in in_name(value):
            complaint = f"{value} cannot stand in the name of a run"
        if complaint:
            raise BadInput(f"{place}: {complaint}")
    if len({in_name(value) for value in values}) < len(values):
        raise BadInput(f"{place}: two values agree in the six digits of a run's name; "
                       "leave one out")
    if len(values) < 2:
        raise BadInput(f"{place}: give at least two values, or set the option itself")
    return sorted(values) if all(map(is_number, values)) else list(values)


def complaint_on(option, value):
    """What is wrong with a value of an option, in words, or None."""
    try:
        Options(**{option: value})
    except ValidationError as error:
        return one_line(error)
    return None


def is_number(value):
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def numbers(point):
    """What points are sorted by: texts have no order."""
    return [value if is_number(value) else 0 for value in point]


def in_name(value):
    """A value as it stands in the name of a run."""
    return f"{value:g}" if is_number(value) else str(value)


# The search ---------------------------------------------------------------------------------------

class Search:
    """The search of one arm. A point is one value for each option, in the grids' order."""

    def __init__(self, grids, seeds=1):
        self.grids = grids  # as checked_grids returns them
        self.seeds = seeds  # how many there are to tune by
        self.losses = {}    # point -> [loss with each seed so far]; infinite where a run has failed

    def wanted(self):
        """[(point, number of the seed)] to try next; empty once the search is over."""
        points = [p for p in itertools.product(*self.grids.values()) if p not in self.losses]
        points = points or [point for _, point in self.beyond()]
        if points:
            return [(point, 0) for point in points]
        finite = [point for point in self.losses if math.isfinite(self.loss(point))]
        if len(finite) < 2:
            return []  # nothing is to be decided
        return [(point, number) for point in sorted(finite, key=self.loss)[:FINALISTS]
                for number in range(len(self.losses[point]), self.seeds)]

    def loss(self, point):
        """The mean over the seeds that it was tried with."""
        return mean(self.losses[point])

    def best(self):
        """The point with the lowest loss, the first of several; None if no run was finished."""
        if not self.losses:
            return None
        point = min(self.losses, key=self.loss)
        return point if math.isfinite(self.loss(point)) else None

    def values(self, point):
        """{option: value} of a point."""
        return dict(zip(self.grids, point))

    def edges(self):
        """[(number of an option, whether above)] where the best point has no neighbour that was
        tried, though there can be one: of text there is none."""
        best = self.best()
        found = []
        for i, grid in enumerate(self.grids.values()):
            if best is None or not all(map(is_number, grid)):
                continue
            tried = self.tried(i)
            found += [(i, False)] if best[i] == min(tried) else []
            found += [(i, True)] if best[i] == max(tried) else []
        return found

    def tried(self, i):
        """The values of option i that were tried with the best point's other values."""
        best = self.best()
        return [p[i] for p in self.losses if p[:i] + p[i + 1:] == best[:i] + best[i + 1:]]

    def beyond(self):
        """[(option, point)] beyond the edges, as far as an option goes and there is patience."""
        best = self.best()
        found = []
        for i, above in self.edges():
            option, grid = list(self.grids.items())[i]
            value = next_value(grid, best[i], above)
            if above:
                extensions = sum(tried > grid[-1] for tried in self.tried(i))
            else:
                extensions = sum(tried < grid[0] for tried in self.tried(i))
            is_new = value != best[i] and complaint_on(option, value) is None
            if is_new and extensions < MOST_EXTENSIONS:
                found.append((option, best[:i] + (value,) + best[i + 1:]))
        return found

    def extensions(self):
        """A line for each point beyond the grids that is to be tried next."""
        if not self.grids or len(self.losses) < math.prod(map(len, self.grids.values())):
            return []
        best = self.values(self.best()) if self.best() else {}
        return [f"{option} {in_name(best[option])} did best, at the edge of what was tried; "
                f"{in_name(self.values(point)[option])} is next" for option, point in self.beyond()]

    def choice(self):
        """The line that says why the best point is chosen."""
        words = in_words({point: losses[0] for point, losses in self.losses.items()})
        again = {p: self.loss(p) for p, losses in self.losses.items() if len(losses) > 1}
        if again:
            words += f"; mean of {self.seeds} seeds {in_words(again)}"
        best = [f"{option} {in_name(value)}" for option, value in self.values(self.best()).items()]
        edge = " - the edge of what was tried" if self.edges() else ""
        return f"{words} -> {', '.join(best)}{edge}"


def in_words(losses):
    """0.001: 1.6120, 0.002: diverged of {point: loss}."""
    words = []
    for point in sorted(losses, key=numbers):
        shown = f"{losses[point]:.4f}"
        if losses[point] > DIVERGED / 1000:  # the mean of seeds of which one diverged, too
            shown = "failed" if math.isinf(losses[point]) else "diverged"
        words.append(f"{' '.join(map(in_name, point))}: {shown}")
    return ", ".join(words)


def next_value(grid, value, above):
    """Beyond `value`, the edge of an ascending grid extended so far, by the factor between the
    grid's last two values, or its first two. The same value where they have none."""
    one, other = (grid[-2], grid[-1]) if above else (grid[1], grid[0])
    if one <= 0 or other <= 0:
        return value
    extended = value * other / one
    return round(extended) if isinstance(value, int) else float(f"{extended:.6g}")
