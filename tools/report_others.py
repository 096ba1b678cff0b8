"""The sections of tools/report.py on benches and inspections."""
from base.files import shown
from tools import report_figures as figures
from tools.report_data import Section

TOKENS = 64  # of a text, whose maps are shown
MAPS = 128   # of an inspection, at most
ALIKE = ("mode", "batch", "dtype", "threads", "machine", "device")
INVISIBLE = {" ": "␣", "\n": "⏎", "\t": "⇥"}


def sections_of_bench(bench):
    """A Section for each mode, batch and machine of a bench."""
    groups = {}
    if not bench.rows:
        yield Section(f"Speed ({shown(bench.folder)})", "Nothing was measured: no cell ended well.")
    for row in bench.rows:
        key = tuple(row["cell"].get(name) for name in ALIKE)
        groups.setdefault(key, []).append(row)
    for (mode, batch, dtype, threads, machine, device), rows in groups.items():
        section = Section(f"Speed: {mode}, batch {batch} ({shown(bench.folder)})")
        section.sentence = fastest(rows)
        looks = figures.Looks([], "softmax")
        section.figures = list(figures.over_length(rows, looks))
        section.provenance = {
            "machine": f"{machine}, {device}, {threads} threads, {dtype}",
            "rounds": f"{len(rows)} measurements, each a median; several of a cell: their median"}
        yield section


def fastest(rows):
    """Who is faster than softmax at the longest length."""
    longest = max(row["cell"]["length"] for row in rows)
    times = {}
    for row in rows:
        if row["cell"]["length"] == longest:
            times.setdefault(row["cell"]["mixer"], []).append(figures.amount(row, "time"))
    times = {mixer: figures.median(values) for mixer, values in times.items()}
    best = min(times, key=times.get)
    text = f"At {longest:,} tokens {best} is the fastest, {times[best]:.3g} ms a token"
    if "softmax" in times and best != "softmax":
        text += f", {times['softmax'] / times[best]:.2g} times as fast as softmax"
    return text + "."


def section_of_inspection(inspection):
    """The attention and influence maps of a run."""
    report = inspection.report
    section = Section(f"Attention: {shown(inspection.folder.parent)}")
    tokens = report["tokens"][:TOKENS]
    maps = []
    for name, matrix in sorted(inspection.matrices.items(), key=in_order):
        heads = [(name, matrix)]
        if matrix.ndim == 3:
            heads = [(f"{name}, head {h}", head) for h, head in enumerate(matrix)]
        for title, head in heads[:MAPS - len(maps)]:
            size = min(len(tokens), len(head))
            maps.append({"name": title_of(title, report), "values": rounded(head[:size, :size])})
    section.maps = {"tokens": [visible(token) for token in tokens], "maps": maps}
    shown_of = f"{len(tokens)} tokens"
    if len(tokens) < len(report["tokens"]):
        shown_of = f"the first {len(tokens)} of {len(report['tokens'])} tokens"
    section.sentence = (f"Who attends to whom in {shown_of}: a row is a token that attends, "
                        "a column one that is attended to.")
    for layer in report["layers"]:
        if layer["no_matrix"]:
            section.notes.append(f"layer {layer['layer']}, {layer['mixer']}: no attention matrix, "
                                 f"{layer['no_matrix']}")
    section.provenance = {"checkpoint": report["checkpoint"]}
    return section


def in_order(item):
    """attention.2 before attention.10, the model's influence last."""
    kind, _, number = item[0].partition(".")
    return kind, number.zfill(9)


def title_of(name, report):
    """What a map is called: attention.2 by its layer's mixer."""
    kind, _, rest = name.partition(".")
    number, _, head = rest.partition(",")
    for layer in report["layers"]:
        if number == str(layer["layer"]):
            return figures.plain(f"{kind}, layer {number} ({layer['mixer']}){head and ',' + head}")
    return figures.plain(f"{kind}, {rest}")


def rounded(matrix):
    """Rows of numbers to three digits; what is not finite is None."""
    rows = []
    for row in matrix.tolist():
        rows.append([float(f"{value:.3g}") if abs(value) < 1e30 else None for value in row])
    return rows


def visible(token):
    """A token as an axis shows it."""
    return figures.plain("".join(INVISIBLE.get(c, c) for c in token))
