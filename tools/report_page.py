"""The page of tools/report.py: text that is escaped, numbers as JSON, and two scripts, plotly.js
and report.js, of which the page itself says by their checksums that no other may run."""
import base64
import hashlib
import html
import json
from functools import cache
from pathlib import Path

from plotly.offline import get_plotlyjs

from base.errors import printable

HERE = Path(__file__).parent
SHOWN_ON_A_PHONE = 4     # columns of a table
UNEQUAL = "not equal: "  # how a note on an option begins, see tools/compare_table.py

PAGE = """\
<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>nanomix report</title>
<style>{css}</style>
</head>
<body>
<header>
<h1>nanomix report</h1>
<p class="quiet">{made}</p>
<p id="live" class="quiet" hidden></p>
</header>
<nav aria-label="mixers" id="chips">{chips}</nav>
<main>
<div id="verdicts" class="words">{verdicts}</div>
{sections}
</main>
<script type="application/json" id="numbers">{numbers}</script>
<script>{plotly}</script>
<script>{script}</script>
</body>
</html>
"""


def escaped(text):
    """A text of others as HTML, letter by letter, in an element or between double quotes."""
    return html.escape(printable(str(text)))


def as_json(value):
    """JSON that may stand in a <script>: there is no < in it."""
    return json.dumps(value, allow_nan=False).replace("<", "\\u003c")


@cache
def scripts():
    """(plotly.js, report.js)"""
    # what an HTML parser makes of line ends, so that the checksum is of what the browser sees
    sources = get_plotlyjs(), (HERE / "report.js").read_text(encoding="utf-8")
    return tuple(source.replace("\r\n", "\n").replace("\r", "\n") for source in sources)


def policy(live):
    """What the page may do: run these two scripts, style itself; live also ask its own server."""
    hashes = []
    for source in scripts():
        digest = hashlib.sha256(source.encode()).digest()
        hashes.append(f"'sha256-{base64.b64encode(digest).decode()}'")
    connect = "'self'" if live else "'none'"
    return ("default-src 'none'; style-src 'unsafe-inline'; img-src data: blob:; "
            f"script-src {' '.join(hashes)}; connect-src {connect}; base-uri 'none'; "
            "form-action 'none'")


def page(sections, made, live=False):
    """The whole page as a text. made: what and when made it, in words."""
    plotly, script = scripts()
    words = words_of(sections)
    return PAGE.format(
        policy=policy(live), css=(HERE / "report.css").read_text(encoding="utf-8"),
        made=escaped(made), chips=chips(sections), verdicts=words["verdicts"],
        sections="\n".join(section_html(number, section, words)
                           for number, section in enumerate(sections)),
        numbers=as_json(numbers_of(sections, live)), plotly=plotly, script=script)


def numbers_of(sections, live=False):
    """What report.js draws, and in a live page replaces: the plots' numbers by section."""
    return {"live": live, "sections": [
        {"curves": section.curves, "figures": section.figures, "maps": section.maps}
        for section in sections]}


def words_of(sections):
    """{id of an element: its HTML}: all text that changes while runs go on."""
    words = {"verdicts": verdicts(sections)}
    for number, section in enumerate(sections):
        words[f"s{number}-words"] = words_of_section(section)
    return words


def verdicts(sections):
    """The sentences of all sections, which a page of one does not need twice."""
    if len(sections) == 1:
        return ""
    items = []
    for number, section in enumerate(sections):
        items.append(f'<li><a href="#s{number}">{escaped(section.title)}</a>: '
                     f"{escaped(section.sentence)}</li>")
    return f"<ul>{''.join(items)}</ul>"


def words_of_section(section):
    parts = [f'<p class="verdict">{escaped(section.sentence)}</p>']
    if section.status:
        lines = "".join(f"<li>{escaped(line)}</li>" for line in section.status)
        parts.append(f'<ul class="status">{lines}</ul>')
    if section.table:
        parts.append(table(section.table))
    if section.notes:
        lines = "".join(f"<li>{escaped(note)}</li>" for note in section.notes)
        parts.append(f"<details><summary>{escaped(summary_of(section.notes))}</summary>"
                     f"<ul>{lines}</ul></details>")
    return "".join(parts)


def summary_of(notes):
    """What stands above the notes while they are folded: the options that were not equal."""
    unequal = [note.removeprefix(UNEQUAL).partition(" is ")[0] for note in notes
               if note.startswith(UNEQUAL)]
    options = f" ({', '.join(unequal)})" if unequal else ""
    return f"What was not equal{options}, how it was judged, what was left out"


def table(rows):
    """A table of which each row belongs to the arm that it names; empty columns are left out."""
    empty = ("", "n/a")
    names = [name for name in rows[0] if any(row.get(name, "") not in empty for row in rows)]
    lines = [tag_row("th", {name: name for name in names}, names)]
    lines += [tag_row("td", row, names) for row in rows]
    return f'<div class="wide"><table>{"".join(lines)}</table></div>'


def tag_row(tag, row, names):
    cells = []
    for i, name in enumerate(names):
        classes = ["left"] if name in ("mixer", "verdict") else []
        classes += ["more"] if i >= SHOWN_ON_A_PHONE else []
        text = escaped(row.get(name, "")).replace("_", "_<wbr>")  # where a line may break
        if name == "minus baseline":
            text = text.replace("[", '<span class="whole">[').replace("]", "]</span>")
        cells.append(f'<{tag} class="{" ".join(classes)}">{text}</{tag}>')
    return f'<tr data-label="{escaped(row["mixer"])}">{"".join(cells)}</tr>'


def section_html(number, section, words):
    name = f"s{number}"
    parts = [f'<section id="{name}"><h2>{escaped(section.title)}</h2>',
             f'<div id="{name}-words" class="words">{words[f"{name}-words"]}</div>']
    if section.curves:
        parts.append(curves_html(name, section.curves))
    for i, figure in enumerate(section.figures):
        parts.append(plot(f"{name}-f{i}", escaped(html.unescape(figure["title"]))))
    if section.maps:
        choices = {str(i): one["name"] for i, one in enumerate(section.maps["maps"])}
        parts.append(plot(f"{name}-map", select("map", "map", choices)))
    if section.provenance:
        lines = "".join(f"<dt>{escaped(what)}</dt><dd>{escaped(text)}</dd>"
                        for what, text in section.provenance.items())
        parts.append(f"<details><summary>Where it comes from</summary><dl>{lines}</dl></details>")
    return "".join(parts) + "</section>"


def curves_html(name, curves):
    seeds = {"band": "median and range of the seeds", "each": "each seed"}
    controls = [select("y", "show", curves["quantities"]), select("x", "over", curves["axes"]),
                select("seeds", "as", seeds)]
    return plot(f"{name}-curves", " ".join(controls))


def plot(name, caption):
    return (f'<figure><figcaption>{caption}</figcaption>'
            f'<div class="plot" id="{name}"></div></figure>')


def select(name, label, choices):
    """choices: {value: text}, the text of maps escaped for plotly.js already."""
    options = "".join(f'<option value="{escaped(value)}">{escaped(html.unescape(text))}</option>'
                      for value, text in choices.items())
    return f'<label>{label} <select name="{name}">{options}</select></label>'


def chips(sections):
    """A button for each arm of the page, black if it is the baseline of all that it is in; a click
    shows those that were clicked alone."""
    metas = {}
    for section in sections:
        traces = [trace for figure in section.figures for trace in figure["traces"]]
        for one in [*traces, *(section.curves or {}).get("arms", [])]:
            label, colour = one["meta"]["label"], one["meta"]["colour"]
            metas[label] = metas.get(label) or colour
    buttons = []
    for label in sorted(metas):
        colour = metas[label] or "var(--ink)"
        buttons.append(f'<button type="button" aria-pressed="false" data-label="{escaped(label)}" '
                       f'style="--colour: {colour}">{escaped(label)}</button>')
    return "".join(buttons)
