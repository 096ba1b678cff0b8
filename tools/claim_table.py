"""The table of claims, in Markdown: its words are found anew from the records of the runs."""
from base.errors import BadInput, printable
from base.files import shown
from base.terminal import coloured, wrapped
from tools.claim_outcomes import findings, outcome_of_claim
from tools.claim_record import (
    MEND, arms_of, card_in, check_against_card, read_claim_file, recorded)
from tools.verdicts import ALPHA, Verdict, in_words

COLUMNS = ("so", "claim", "measured, minus the baseline, in nats")
COLOURS = {"confirmed": "green", "refuted": "red", "undecided": "quiet"}  # in a terminal


def table(rows):
    """Rows, one a claim, {column: text}, as a table in Markdown."""
    lines = ["| " + " | ".join(COLUMNS) + " |", "|" + "---|" * len(COLUMNS)]
    for row in rows:
        lines.append("| " + " | ".join(cell(row.get(name, "")) for name in COLUMNS) + " |")
    return "\n".join(lines)


def table_for_terminal(rows):
    """The same for a terminal: a claim's word, in colour, its sentence, and below what was
    measured."""
    lines = []
    for row in rows:
        outcome, claim, measured = (printable(" ".join(row.get(name, "").split()))
                                    for name in COLUMNS)
        word = outcome.strip("*")
        sentence = wrapped(f"{word:11} {claim}", " " * 12)
        lines.append(coloured(sentence[:len(word)], COLOURS.get(word)) + sentence[len(word):])
        for text in filter(None, measured.replace("`", "").split("<br>")):
            lines.append(wrapped(" " * 12 + text, " " * 14))
    return "\n".join(lines)


def row_of_claim(folder):
    """The row of a claim in the table, {column: text}, its words found anew from the records.
    BadInput if claim.json says otherwise."""
    content, card, arms = read_claim(folder)
    if not arms:
        return row_of_card(card, "no look yet")
    found = findings(card, arms, content["counting"], content["sizes"])
    if words_of(found) != words_of(content["arms"]):
        raise BadInput(f"{shown(folder)}/claim.json and the records beside it disagree; {MEND}")
    measured = "<br>".join(measured_in_words(card, name, found) for name in card.rivals())
    measured += f" ({sum(content['hours'].values()):.1f} hours)"
    return row_of_card(card, outcome_of_claim(found), measured)


def read_claim(folder):
    """The content of claim.json, its Card, and {arm: {seed: Record}}."""
    content = read_claim_file(folder)
    card = card_in(content, folder)
    records = recorded(folder)
    if records:
        check_against_card(card, records)
    return content, card, arms_of(records)


def together_in_words(folders):
    """What becomes of the claims if all of them share one error; each has its own in the table."""
    changed = []
    for folder in folders:
        content, card, arms = read_claim(folder)
        if arms:
            alone, shared = (
                outcome_of_claim(findings(card, arms, content["counting"], content["sizes"], n))
                for n in (1, len(folders)))
            if shared != alone:
                changed.append(f"{content['claim']} {shared}")
    return (f"Each claim may err with a chance of {ALPHA:g}. If all {len(folders)} shared that: "
            + (", ".join(changed) or "the same words") + ".")


def words_of(found):
    """What claim.json says of each arm in words."""
    words = {}
    for name, arm in found.items():
        words[name] = {key: arm[key]["word"] if isinstance(arm[key], dict) else arm[key]
                       for key in ("against_baseline", "against_counting", "outcome") if key in arm}
    return words


def row_of_card(card, outcome, measured=""):
    texts = (f"**{outcome}**", f"{card.claim} ({card.paper})", measured)
    return dict(zip(COLUMNS, texts))


def measured_in_words(card, name, found):
    """An arm's verdict and what it rests on, and what was predicted, if it came otherwise."""
    arm, baseline = found[name], found[card.baseline]
    words = [f"{difference_in_words(arm)} {verdict_in_words(arm)}".strip()]
    if arm["outcome"] == "refuted" and arm["prediction"]:
        words.append(f"predicted {arm['prediction']}")
    if arm["against_counting"]:
        words.append(f"against counting {arm['against_counting']['word']}")
    words += accuracies_in_words(arm, baseline)
    if arm["against_baseline"]:
        words.append(f"{arm['against_baseline']['seeds']} seeds")
    if arm["diverged"]:
        words.append(f"{arm['diverged']} of {arm['runs']} runs diverged")
    if "parameters" in baseline and "parameters" in arm:
        words.append(f"{arm['parameters'] / baseline['parameters']:.3f}x the parameters")
    return f"`{name}` against `{card.baseline}`: {'; '.join(words)}"


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
    """Of a recall task, beside the losses that the verdict is of, a list of one text or none."""
    if arm["accuracy"] is None or baseline["accuracy"] is None:
        return []
    return [f"accuracy {arm['accuracy']:.2f} against {baseline['accuracy']:.2f}"]


def cell(text):
    """A text as a cell of a Markdown table, whatever is in it."""
    return printable(" ".join(text.split())).replace("|", "\\|")
