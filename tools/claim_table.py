"""The table of claims, in Markdown: its words are found anew from the records of the runs."""
from base.errors import BadInput, printable
from base.files import shown
from tools.claim_outcomes import findings, outcome_of_claim
from tools.claim_record import (
    MEND, arms_of, card_in, check_against_card, read_claim_file, recorded)
from tools.verdicts import Verdict, in_words

COLUMNS = ("claim", "arm", "predicted", "minus baseline, nats", "verdict", "seeds", "parameters",
           "hours", "so")


def table(rows):
    """Rows, {column: text}, as a table in Markdown."""
    lines = ["| " + " | ".join(COLUMNS) + " |", "|" + "---|" * len(COLUMNS)]
    for row in rows:
        lines.append("| " + " | ".join(cell(row.get(name, "")) for name in COLUMNS) + " |")
    return "\n".join(lines)


def rows_of_claim(folder):
    """The rows of a claim in the table, {column: text}, its words found anew from the records.
    BadInput if claim.json says otherwise."""
    content = read_claim_file(folder)
    card = card_in(content, folder)
    records = recorded(folder)
    if not records:
        return [first_cells(card, "no look yet")]
    check_against_card(card, records)
    found = findings(card, arms_of(records), content["counting"], content["sizes"])
    if words_of(found) != words_of(content["arms"]):
        raise BadInput(f"{shown(folder)}/claim.json and the records beside it disagree; {MEND}")
    rows = []
    for name in card.rivals():
        first = first_cells(card, outcome_of_claim(found)) if not rows else {}
        rows.append(first | arm_cells(card, name, found, content["hours"]))
    return rows


def words_of(found):
    """What claim.json says of each arm in words."""
    words = {}
    for name, arm in found.items():
        words[name] = {key: arm[key]["word"] if isinstance(arm[key], dict) else arm[key]
                       for key in ("against_baseline", "against_counting", "outcome") if key in arm}
    return words


def first_cells(card, outcome):
    return {"claim": f"**{outcome}**: {card.claim} ({card.paper})"}


def arm_cells(card, name, found, hours):
    arm, baseline = found[name], found[card.baseline]
    verdict = verdict_in_words(arm)
    if arm["against_counting"]:
        verdict += f"; against counting: {arm['against_counting']['word']}"
    if arm["diverged"]:
        verdict += f"; {arm['diverged']} of {arm['runs']} runs diverged"
    times = ""
    if "parameters" in baseline and "parameters" in arm:
        times = f"{arm['parameters'] / baseline['parameters']:.3f}x"
    return {
        "arm": f"`{name}` against `{card.baseline}`",
        "predicted": arm["prediction"] or "",
        "minus baseline, nats": difference_in_words(arm) + accuracies_in_words(arm, baseline),
        "verdict": verdict,
        "seeds": str((arm["against_baseline"] or {}).get("seeds", "")),
        "parameters": times,
        "hours": f"{hours.get(name, 0):.1f}",
        "so": arm["outcome"] or "",
    }


def verdict_in_words(arm):
    word = arm["against_baseline"]
    if word is None:
        return "no look yet"
    return in_words(Verdict(**{key: value for key, value in word.items() if key != "look"}))


def difference_in_words(arm):
    word = arm["against_baseline"]
    if word is None:
        return ""
    text = f"{word['difference']:+.4f}"
    if word["difference_low"] is not None:
        text += f" [{word['difference_low']:+.4f}, {word['difference_high']:+.4f}]"
    return text


def accuracies_in_words(arm, baseline):
    """Of a recall task, beside the losses that the verdict is of."""
    if arm["accuracy"] is None or baseline["accuracy"] is None:
        return ""
    return f"; accuracy {arm['accuracy']:.2f} against {baseline['accuracy']:.2f}"


def cell(text):
    """A text as a cell of a Markdown table, whatever is in it."""
    return printable(" ".join(text.split())).replace("|", "\\|")
