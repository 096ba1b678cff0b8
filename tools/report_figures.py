"""The plots of tools/report.py, but for the curves and maps that the page draws itself.

A figure is {"title": text, "traces": [...], "layout": {...}}, traces and layout as plotly.js has
them, without colours: the page gives each trace that of its meta.colour, or black (on a dark page
white) where that is null, the baseline's. What plotly.js shows as text it reads as HTML of sorts,
so that all text of others goes through plain(). "cut" names an axis whose range leaves out arms far
above all others, until they are chosen.
"""
import html
import math
from statistics import mean, median

from base.errors import printable
from tools.colours import colour_of
from tools.compare_curves import position_edges
from tools.drawing import doublings, in_bytes, near, outlying
from tools.verdicts import in_words

NAME_LENGTH = 60  # of what is shown of a name
DASHES = ("solid", "dash", "dot", "dashdot")
SYMBOLS = ("circle", "square", "diamond", "triangle-up", "x", "cross")


def plain(text):
    """A text as plotly.js is to show it, letter by letter."""
    text = printable(str(text))
    if len(text) > NAME_LENGTH:
        text = text[:NAME_LENGTH - 1] + "…"
    return html.escape(text, quote=False).replace("$", "&#36;")  # between which it sees formulas


class Looks:
    """What the arms of a section look like: arms of one mixer share its colour and differ in
    dashes and symbols."""

    def __init__(self, arms, baseline):
        self.baseline = baseline
        self.of_label = {}
        numbers = {}
        for arm in arms:
            number = numbers.setdefault(arm.mixer, 0)
            numbers[arm.mixer] += 1
            self.of_label[arm.label] = arm.mixer, number

    def meta(self, label):
        mixer, _ = self.of_label.get(label, (label, 0))
        colour = None if label == self.baseline else colour_of(mixer)
        return {"label": label, "colour": colour}

    def dash(self, label):
        return DASHES[self.of_label.get(label, (label, 0))[1] % len(DASHES)]

    def symbol(self, label):
        return SYMBOLS[self.of_label.get(label, (label, 0))[1] % len(SYMBOLS)]


def trace(looks, label, x, y, mode, hover, **more):
    """A line or points of an arm; hover: of a point, as plotly.js's templates are written."""
    return {
        "type": "scatter", "name": plain(label), "meta": looks.meta(label), "mode": mode,
        "x": x, "y": y, "line": {"dash": looks.dash(label)},
        "marker": {"symbol": looks.symbol(label)},
        "hovertemplate": f"{hover}<extra>%{{fullData.name}}</extra>", **more}


def axis(title, **more):
    return {"title": {"text": title}, **more}


def line_across(name, value):
    """A reference line at a loss, named at its right end."""
    return {"type": "line", "xref": "paper", "x0": 0, "x1": 1, "y0": value, "y1": value,
            "line": {"dash": "dot", "width": 1},
            "label": {"text": plain(name), "textposition": "end", "font": {"size": 10}}}


def cut_off(figure, axis_name, values):
    """The figure, with a range of that axis that leaves out the arms which are outlying by their
    values, {label: [number]}, and names them in the title."""
    beyond = outlying(values)
    if not beyond:
        return figure
    kept = [value for label, of_arm in values.items() if label not in beyond for value in of_arm]
    room = 0.08 * (max(kept) - min(kept)) or 0.01
    figure["layout"][axis_name]["range"] = [min(kept) - room, max(kept) + room]
    figure["cut"] = axis_name
    names = ", ".join(f"{plain(label)} {median(values[label]):.3f}" for label in sorted(beyond))
    figure["title"] += f"; not in the picture until a double click: {names}"
    return figure


# Losses ---------------------------------------------------------------------------------------

def differences(verdicts, looks, margin, unit):
    """Each arm's difference from the baseline, {label: Verdict}, with the interval that its word
    rests on."""
    traces = []
    for label in sorted(verdicts, key=lambda label: -verdicts[label].difference):
        verdict = verdicts[label]
        if verdict.word in ("baseline", "leaks"):
            continue
        low, high = verdict.difference_low, verdict.difference_high
        bar = None
        if low is not None:
            bar = {"type": "data", "symmetric": False, "array": [high - verdict.difference],
                   "arrayminus": [verdict.difference - low]}
        more = {"error_x": bar} if bar else {}
        traces.append(trace(
            looks, label, [verdict.difference], [plain(label)], "markers",
            f"%{{x:+.4f}}, {plain(in_words(verdict))}", **more))
    shapes = [{"type": "line", "x0": 0, "x1": 0, "yref": "paper", "y0": 0, "y1": 1,
               "line": {"width": 1}}]
    if margin is not None:
        shapes.append({"type": "rect", "x0": -margin, "x1": margin, "yref": "paper", "y0": 0,
                       "y1": 1, "line": {"width": 0}, "fillcolor": "gray", "opacity": 0.15,
                       "layer": "below"})
    layout = {
        "height": 130 + 26 * len(traces), "shapes": shapes,
        "xaxis": axis(f"minus {plain(looks.baseline)}, {unit}"),
        "yaxis": {"type": "category", "automargin": True}}
    title = "Difference from the baseline, and the interval that the word rests on"
    if margin is not None:
        title += f"; shaded: the margin of {margin:.3f}"
    spans = {}
    for label, verdict in verdicts.items():
        if verdict.word not in ("baseline", "leaks"):
            ends = verdict.difference_low, verdict.difference, verdict.difference_high
            spans[label] = [end for end in ends if end is not None]
    return cut_off({"title": title, "traces": traces, "layout": layout}, "xaxis", spans)


def over_rate(losses, chosen, looks):
    """The loss on the data to choose by, {label: {learning rate: loss}}, and {label: the rates that
    were chosen}."""
    traces = []
    for label, by_rate in losses.items():
        rates = sorted(by_rate)
        one = trace(looks, label, rates, [by_rate[rate] for rate in rates], "lines+markers",
                    "%{x:g}: %{y:.4f}")
        one["marker"]["size"] = [14 if rate in chosen[label] else 7 for rate in rates]
        traces.append(one)
    ticks = sorted({rate for by_rate in losses.values() for rate in by_rate})
    layout = {"xaxis": axis("learning rate", type="log", tickvals=ticks,
                            ticktext=[f"{rate:g}" for rate in ticks]),
              "yaxis": axis("loss to choose by, nats per target")}
    figure = {"title": "Loss against learning rate; large points were chosen", "traces": traces,
              "layout": layout}
    return cut_off(figure, "yaxis", {label: list(of_arm.values())
                                     for label, of_arm in losses.items()})


def over_position(arms, looks, references):
    """Loss at each position of the context, mean of the seeds."""
    traces = []
    for arm in arms:
        curves = [record.scores["by_position"] for record in arm.records]
        edges = position_edges(len(curves[0])).tolist()
        x, y = [], []
        for first, last in zip(edges, edges[1:]):
            values = [value for curve in curves for value in curve[first:last]
                      if value is not None]
            if values:
                x.append((first + 1 + last) / 2)
                y.append(mean(values))
        traces.append(trace(looks, arm.label, x, y, "lines", "position %{x}: %{y:.4f}"))
    values = [value for one in traces for value in one["y"]] or [0]
    longest = max([x for one in traces for x in one["x"]], default=1)
    ticks = doublings(1, 2 * longest)
    layout = {"xaxis": axis("position in the context, from 1", type="log", tickvals=ticks,
                            ticktext=[f"{tick:,}" for tick in ticks]),
              "yaxis": axis("loss, nats per token"),
              "shapes": [line_across(reference.name, reference.loss)
                         for reference in near(references, min(values), max(values))]}
    figure = {"title": "Loss by position: it falls as long as a mixer makes use of more context",
              "traces": traces, "layout": layout}
    # the first positions are alike and far above all that comes
    late = {one["meta"]["label"]: [y for x, y in zip(one["x"], one["y"]) if x > longest ** 0.5]
            for one in traces}
    return cut_off(figure, "yaxis", late)


def over_cells(arms, looks):
    """Accuracy of a recall task by difficulty, mean of the seeds and their range."""
    traces = []
    for arm in arms:
        cells = list(arm.records[0].scores["by_cell"])
        x, y, above, below = [], [], [], []
        for cell in cells:
            values = [record.scores["by_cell"].get(cell) for record in arm.records]
            values = [value for value in values if value is not None]
            if values:
                x.append(plain(cell))
                y.append(mean(values))
                above.append(max(values) - y[-1])
                below.append(y[-1] - min(values))
        traces.append(trace(
            looks, arm.label, x, y, "lines+markers", "%{x}: %{y:.3f}",
            error_y={"type": "data", "symmetric": False, "array": above, "arrayminus": below}))
    layout = {"xaxis": {"type": "category", "automargin": True},
              "yaxis": axis("accuracy", range=[-0.03, 1.03])}
    return {"title": "Accuracy by difficulty: mean of the seeds, and their range",
            "traces": traces, "layout": layout}


def over_state(lines, looks):
    """Loss over the bytes of state at the end of the context. None at all has a place of its own
    on the logarithmic axis."""
    powers = [math.log2(line.state_bytes) for line in lines if line.state_bytes] or [0.0]
    nothing = min(powers) - 2
    ticks = {}
    if any(line.state_bytes == 0 for line in lines):
        ticks[nothing] = "none"
    for power in range(math.floor(min(powers)), math.ceil(max(powers)) + 1, 2):
        ticks[power] = in_bytes(2**power)
    span = [min(ticks) - 1, max(max(ticks), *powers) + 1]
    points = {line.mixer: (math.log2(line.state_bytes) if line.state_bytes else nothing, line.loss)
              for line in lines}
    far = outlying({line.mixer: [line.loss] for line in lines})
    near_each_other = {name: place for name, place in points.items() if name not in far}
    named = [*with_space(near_each_other, span[1] - span[0]), *far]
    traces = []
    for line in lines:
        x, y = points[line.mixer]
        text = plain(line.mixer) if line.mixer in named else ""
        traces.append(trace(
            looks, line.mixer, [x], [y], "markers+text",
            f"{in_bytes(line.state_bytes)}: %{{y:.4f}}", text=[text],
            textposition="top center", cliponaxis=False))
    layout = {"xaxis": axis("state of one sequence",
                            tickvals=list(ticks), ticktext=list(ticks.values()), range=span),
              "yaxis": axis("loss, nats per target")}
    figure = {"title": "Loss against the state of a sequence as long as the context",
              "traces": traces, "layout": layout}
    return cut_off(figure, "yaxis", {line.mixer: [line.loss] for line in lines})


def with_space(points, width):
    """The names, of {name: (x, y)}, whose points have space for them on a phone; of those in each
    other's way the first. The others show when they are pointed at."""
    heights = [y for _, y in points.values()]
    line = 0.06 * (max(heights) - min(heights))
    named = []
    for name, (x, y) in points.items():
        reach = 0.013 * width * len(name)  # half of what a name takes

        def is_in_the_way(other):
            other_x, other_y = points[other]
            room = reach + 0.013 * width * len(other)
            return abs(other_x - x) < room and abs(other_y - y) <= line

        if not any(map(is_in_the_way, named)):
            named.append(name)
    return named


# Speed ----------------------------------------------------------------------------------------

SPEED = (
    ("time", "ms a token", "Time a token over the length"),
    ("memory", "MiB", "Memory that a step adds, over the length"),
    ("state", "KiB", "State of one sequence over the length"),
)


def over_length(rows, looks):
    """Figures of bench rows that are alike but for the mixer and the length: medians of their
    rounds."""
    series = {}
    for row in rows:
        cell = row["cell"]
        of_mixer = series.setdefault(cell["mixer"], {})
        of_mixer.setdefault(cell["length"], []).append(row)
    for quantity, unit, title in SPEED:
        traces = []
        for mixer, by_length in series.items():
            points = {}
            for length in sorted(by_length):
                values = [amount(row, quantity) for row in by_length[length]]
                values = [value for value in values if value is not None and value > 0]
                if values:
                    points[length] = median(values)
            traces.append(trace(looks, mixer, list(points), list(points.values()),
                                "lines+markers", f"%{{x:,}} tokens: %{{y:.4g}} {unit}"))
        if any(one["x"] for one in traces):
            lengths = sorted({length for one in traces for length in one["x"]})
            layout = {"xaxis": axis("length T, tokens", type="log", tickvals=lengths,
                                    ticktext=[f"{length:,}" for length in lengths]),
                      "yaxis": axis(unit, type="log", dtick="D2")}
            nothing = [one["name"] for one in traces if not one["x"]]
            if nothing:
                title += f"; none, or not known: {', '.join(nothing)}"
            yield {"title": title, "traces": traces, "layout": layout}


def amount(row, quantity):
    """What a row of a bench measured, or None."""
    cell = row["cell"]
    if quantity == "time":
        tokens = 1 if cell["mode"] == "decode" else cell["batch"] * cell["length"]
        return row["ms"] / tokens
    count = row["rise_bytes"] if quantity == "memory" else row["state_bytes"]
    unit = 2**20 if quantity == "memory" else 2**10
    return None if count is None else count / unit
