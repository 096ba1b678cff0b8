"""What counting reaches: n-grams of a text, interpolated; and guessing, in a recall task.

Run: python -m tools.ngrams --dataset=shakespeare_char      (seconds a million tokens)

    P_n(w | c) = (a(cw) - D(a(cw)) + F(c) P_{n-1}(w | c')) / a(c)      P_0 = 1 / V

c are the n - 1 tokens before w, c' the last n - 2 of them, and a(c) the sum of a(cw) over w. This
is modified Kneser-Ney (Chen and Goodman 1998, "An Empirical Study of Smoothing Techniques"): a(cw)
is how often cw occurs in the training split if n is the order of the model, and in how many
different ways cw goes on to the left if n is a lower one. D is one of three discounts, for counts
of 1, of 2 and of more, by their formula; F(c) is the sum of what they take away after c. A context
that was never seen leaves the word to the lower order.

The best order is the first one whose successor does no better on the last tenth of the training
split, given the counts of the rest; the counts then are of the whole training split. The loss is
the mean over every token of the validation split but the first, each predicted from those before it
there: the tokens that a run's report is made of.

--keep writes the losses into results/lines.json, where the lines in tables and pictures come from.
"""
import base.errors  # noqa: F401  before all others: Ctrl-C ends these quietly
import functools
import math
import sys
from itertools import count, islice
from typing import Annotated

import numpy as np
from pydantic import Field

from base.command_line import parse_options
from base.errors import BadInput, exit_on_bad_input
from base.files import ROOT, exists, read_json, write_json
from base.options import checked, option
from data import dataset, load_dataset
from data.tasks import RECALL_SETS, guesses
from tools.score import Lenient
from training.run_folder import data_sha256

LINES = ROOT / "results" / "lines.json"
HIGHEST = 20           # no text of ours comes near this order
MOST_TOKENS = 2**24    # of a text: counting takes some 150 bytes a token


# Counting -------------------------------------------------------------------------------------

def probabilities(train, val, vocab_size):
    """Yields, for orders n = 1, 2, ..., P_n of every token of val but the first, (len(val) - 1,).

    train and val are arrays of tokens below vocab_size."""
    tokens = np.concatenate([train, val]).astype(np.int64)
    before = np.concatenate([np.arange(len(train)), np.arange(len(val))])  # in its own text
    asked = np.arange(len(train) + 1, len(tokens))
    context = np.zeros_like(tokens)       # the number of the n - 1 tokens before each token
    gram = numbers(context, tokens)       # the number of the n-gram that ends with it
    lower = np.full(len(asked), 1 / vocab_size)
    for n in count(1):
        whole = before >= n - 1           # the n-gram does not begin in front of its text
        occurrences = np.flatnonzero(whole[:len(train)])
        yield interpolated(gram, context, occurrences, asked, whole[asked], lower)

        # as a lower order: one of the places where each longer n-gram of the training split ends
        following = np.roll(gram, 1)
        longer = numbers(following, tokens)
        places = np.flatnonzero(before[:len(train)] >= n)
        different = places[np.unique(longer[places], return_index=True)[1]]
        lower = interpolated(gram, context, different, asked, whole[asked], lower)
        context, gram = following, longer


def numbers(context, tokens):
    """Numbers 0, 1, ... of the pairs (context, token), equal for equal ones."""
    return np.unique(context * (tokens.max() + 1) + tokens, return_inverse=True)[1]


def interpolated(gram, context, counted, asked, whole, lower):
    """P of each place in `asked`, by n-grams counted at the places `counted` and by the
    probabilities `lower`, of the order below, where the context was not seen or is not `whole`."""
    n_gram = np.bincount(gram[counted], minlength=gram.max() + 1)
    n_context = np.bincount(context[counted], minlength=context.max() + 1)
    discount = discounts(n_gram)
    kinds, places = np.unique(gram[counted], return_index=True)
    freed = np.bincount(context[counted][places], weights=discount[n_gram[kinds].clip(max=3)],
                        minlength=len(n_context))
    n, c = n_gram[gram[asked]], context[asked]
    p = (n - discount[n.clip(max=3)] + freed[c] * lower) / n_context[c].clip(min=1)
    return np.where(whole & (n_context[c] > 0), p, lower)


def discounts(counts):
    """(4,): what is taken off counts of 0, 1, 2 and of 3 or more (Chen and Goodman, equation 17).

    A half off each where the counts are too few or too high for the formula, and never less than a
    tenth, so that something is left for what was never seen."""
    n = np.bincount(counts.clip(max=5), minlength=5)[:5].astype(float)  # n[i] n-grams occur i times
    if not n[1:].all():
        return np.array([0, 0.5, 0.5, 0.5])
    i = np.arange(1, 4)
    y = n[1] / (n[1] + 2 * n[2])
    return np.concatenate([[0], (i - (i + 1) * y * n[2:] / n[1:4]).clip(0.1, i)])


def ngram_losses(train, val, vocab_size):
    """Yields the mean loss in nats per token of val by unigrams, bigrams, ...: see above."""
    for p in probabilities(train, val, vocab_size):
        yield float(-np.log(p).mean())


def held_out_losses(train, vocab_size):
    """The losses of the last tenth by the counts of the rest, of orders 1 to the first that does no
    better than the one before it."""
    cut = len(train) * 9 // 10
    losses = []
    for loss in islice(ngram_losses(train[:cut], train[cut:], vocab_size), HIGHEST):
        losses.append(loss)
        if len(losses) > 1 and loss >= losses[-2]:
            break
    return losses


def count_lines(data):
    """What results/lines.json says of a text, a Dataset. BadInput if it is too large or too
    short."""
    size = len(data.train) + len(data.val)
    if size > MOST_TOKENS or len(data.train) < 20 or len(data.val) < 2:
        raise BadInput(f"data/{data.name}: counting takes texts of 22 to {MOST_TOKENS:,} tokens, "
                       f"not of {size:,}; choose another --dataset")
    held_out = held_out_losses(data.train, data.vocab_size)
    losses = list(islice(ngram_losses(data.train, data.val, data.vocab_size), len(held_out)))
    best = int(np.argmin(held_out))
    return {
        "data_sha256": data_sha256(data),
        "unigram": losses[0],
        "best": {"order": best + 1, "loss": losses[best]},
        "by_order": losses,
        "held_out_by_order": held_out,
    }


# The lines ------------------------------------------------------------------------------------

Loss = Annotated[float, Field(ge=0, le=1e30)]


class Best(Lenient):
    order: Annotated[int, Field(ge=1, le=HIGHEST)]
    loss: Loss


class Lines(Lenient):
    """What results/lines.json has of a data set."""
    data_sha256: str
    unigram: Loss
    best: Best


def read_lines():
    """{data set: what count_lines made of it}, of results/lines.json. BadInput if it is damaged."""
    if not exists(LINES):
        return {}
    lines = read_json(LINES, "get it anew, or remove it", dict[str, Lines])
    return {name: of_text.model_dump() for name, of_text in lines.items()}


def reference_lines(config, scores):
    """{name: nats per token} of what needs no model, for the data that a run reports on.

    config and scores are a run's, as its Record has them. A text: "unigram" and the best order,
    "7-gram interpolated", from results/lines.json, or counted if the data set is here; a recall
    task: "guess" and the like. {} if the run's data are not known, or it reports on a part of the
    validation split only."""
    name = config["dataset"]
    if name in RECALL_SETS:
        return {guess: loss for guess, (_, loss) in guesses(name).items()}
    if not scores.get("by_block"):  # a tuning run, or scored when half the split was reported on
        return {}
    lines = lines_of(name, config.get("data_sha256"))
    if lines is None:
        return {}
    best = lines["best"]
    return {"unigram": lines["unigram"], f"{best['order']}-gram interpolated": best["loss"]}


@functools.cache
def lines_of(name, sha256):
    """What count_lines makes of the data set of that name and checksum, or None."""
    kept = read_lines().get(name)
    if kept is not None and kept["data_sha256"] == sha256:
        return kept
    if not exists(dataset.DATA / name / "meta.json"):
        return None
    try:
        data = load_dataset(name, block_size=1)
        return count_lines(data) if data_sha256(data) == sha256 else None
    except BadInput:  # damaged, or too large to be counted: there is no line to draw
        return None


# The command ----------------------------------------------------------------------------------

@checked
class NgramOptions:
    dataset: str = option("", "the text to count")
    keep: bool = option(False, "write the losses into results/lines.json")


@exit_on_bad_input("tools.ngrams")
def main():
    options, *_ = parse_options(NgramOptions, sys.argv[1:], __doc__.splitlines()[0],
                                with_config_file=False)
    if not options.dataset:
        raise BadInput("which text? give --dataset")
    if options.dataset in RECALL_SETS:
        raise BadInput(f"--dataset={options.dataset} is a recall task; "
                       "choose a text, such as shakespeare_char")
    data = load_dataset(options.dataset, block_size=1)
    kept = read_lines() if options.keep else {}
    lines = count_lines(data)
    print(f"data/{data.name}, nats per token\n\norder  last tenth of train  validation")
    for n, losses in enumerate(zip(lines["held_out_by_order"], lines["by_order"]), start=1):
        marked = "  <- the best order" if n == lines["best"]["order"] else ""
        print("{:5}  {:19.4f}  {:10.4f}{}".format(n, *losses, marked))
    bpb = lines["best"]["loss"] / math.log(2) / data.bytes_per_token
    print(f"\nthe best order: {bpb:.4f} bits per byte of the validation split")
    if options.keep:
        write_json(LINES, kept | {data.name: lines})


if __name__ == "__main__":
    main()
