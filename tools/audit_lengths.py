"""The audit's question about every length: a beginning alone is as in the whole, and what it leaves
in the state goes on as the whole does; beyond block_size too. Of mixers alone, in float64."""
import copy

import torch

from base.user_code import in_words
from tools.audit_leaks import explain
from tools.audit_place import entering
from tools.audit_subject import Worst, asked, first_over, in_pieces, normal, step
from tools.audit_wide import in_both_modes
from training.chance import call, drawn
from training.leaks import (
    KINDS, beyond_rounding, cast, difference, leaks, limit, precision_within)

EVERY = 300  # each length up to this one, then those of FURTHER
# steps of 17 leave every remainder of 2, 4, .. 32; besides them chunks, and one more or less
FURTHER = sorted({*range(318, 1101, 17), 320, 336, 383, 384, 401, 448, 480, 511, 512, 513, 560, 576,
                  640, 641, 672, 768, 769, 864, 896, 960, 961, 1023, 1024})
WHOLE_CHUNKS = (192, 256, 384, 512, 768, 1024)  # what is asked in training, and of other models
SHORT = 40  # a block_size that is gone beyond
FAR = 2048  # tokens that none behind may change, and behind which single tokens go on
BEYOND = (20, 39, 40, 41, 64, 65, 79, 80, 81, 130)


def lengths(subject, every=EVERY, further=FURTHER):
    """Outputs of a beginning alone, of each length, against those of the one before it, from whose
    state the rest is fed too."""
    worst, onward = Worst(limit("length")), Worst(limit("length"))
    longest = 0
    for i, model in enumerate(subject.bare(block_size=further[-1])):
        last = further[-1] if not subject.trained else model.config.block_size
        for name, module, mode in in_both_modes(model):
            x = normal(1, last, model.config.n_embd)
            most = max(limit("length"), limit("length", precision_within(module, x[:, :71])))
            asking = few = (*range(1, every // 2), *WHOLE_CHUNKS)
            if i == 0 and not module.training:
                asking = (*range(1, every + 1), *further)
            look_at_lengths(worst, onward, module, x, most, f"{name}, {mode}", asking)
            if i == 0:  # float32 may go another way
                look_at_lengths(worst, onward, cast(copy.deepcopy(module), torch.float32),
                                x.float(), limit("length", torch.float32),
                                f"{name}, {mode}, float32", few)
            longest = max(longest, last)
            cuts = [last // 2, min(601, last - 1), last - 1]
            whole = x.expand(4, -1, -1).clone()
            sizes = leaks(module, whole, cuts, lengths=False, huge=False)
            for kind, size in sizes.items():
                most = max(limit(kind), limit(kind, precision_within(module, x[:, :71])))
                worst.note(size, most, f"{name}, {mode}: {KINDS[kind][0]}", f"{last} tokens",
                           explain(module, kind, whole, most))
    passes = f"; {every} lengths and more, up to {longest:,} tokens"
    if not subject.trained:
        passes += look_beyond(subject, worst, onward)
        look_far(subject, worst, onward)
    what = "an output depends on a later token, or on how many there are"
    yield worst.row("lengths", what, passes)
    yield onward.row("onward", "what one call leaves in the state is not the whole's",
                     "; behind one call of each length")


def look_beyond(subject, worst, onward):
    """The same with a small block_size, beyond it; returns words on what could not be asked."""
    try:
        for model in subject.bare(block_size=SHORT):
            x = normal(1, BEYOND[-1], model.config.n_embd)
            for name, module, mode in in_both_modes(model):
                most = max(limit("length"), limit("length", precision_within(module, x[:, :SHORT])))
                look_at_lengths(worst, onward, module, x, most,
                                f"{name}, {mode}, block_size {SHORT}", BEYOND)
    except Exception as error:  # a mixer may refuse more than block_size tokens
        return f", not asked beyond block_size: {in_words(error)}"
    return ", also beyond block_size"


@torch.no_grad()
def look_far(subject, worst, onward):
    """One sequence of FAR tokens and a few more, and the same with the last as single tokens."""
    model = subject.bare(block_size=FAR + 16)[0]
    x = normal(1, FAR + 16, model.config.n_embd)
    changed = torch.cat([x[:, :FAR], -x[:, FAR:]], 1)
    for name, module in asked(model).items():
        most = max(limit("length"), limit("length", precision_within(module, x[:, :71])))
        y = call(module, x)
        moved = difference(call(module, changed), y)[:, :FAR]
        worst.note(moved.max().item(), most, f"{name}: {KINDS['suffix'][0]}", f"{FAR + 16} tokens")
        pieces = in_pieces(module, x, [FAR - 8, *24 * [1]])
        moved = beyond_rounding(module, x, difference(pieces, y), most)
        onward.note(moved.max().item(), most, name,
                    f"{FAR - 8} tokens in the first call, 24 single ones")


@torch.no_grad()
def look_at_lengths(worst, onward, module, x, most, where, asking):
    still = module.training and bool(drawn(module, x[:, :5]))
    before = state = None
    for T in asking:
        if T > x.size(1):
            break
        if module.training:
            y, new_state = call(module, x[:, :T], still=still), None
        else:
            y, new_state = step(module, x[:, :T])
        if before is not None:
            S = before.size(1)
            moved = difference(y[:, :S], before)
            if moved.max() > most:
                moved = beyond_rounding(module, x[:, :T], moved, most)
            if moved.max() > most:
                _, position = first_over(moved, most)
                words = f"{T} tokens: output {position} is another than with {S} tokens"
                changed = x[:, :T].clone()
                changed[:, S:] += 1
                place = entering(module, x[:, :T], changed, time=(T, S))
                worst.note(moved.max().item(), most, where, words, lambda: (words, place))
                return
            worst.note(moved.max().item(), most, where)
            if state is not None:
                look_onward(onward, module, x[:, :T], y, before, state, most, where)
        before, state = y, new_state


def look_onward(onward, module, x, y, before, state, most, where):
    """The rest of x (B, T, C) on top of the state that one call over its beginning has left."""
    S = before.size(1)
    try:
        rest, _ = step(module, x[:, S:], state)
    except Exception:  # `split` says so
        return
    moved = difference(torch.cat([before, rest], 1), y)
    moved[:, :S] = 0
    moved = beyond_rounding(module, x, moved, most)
    words = ""
    if moved.max() > most:
        words = f"{first_over(moved, most)[1] + 1} tokens, of which {S} in the first call"
    onward.note(moved.max().item(), most, where, words)
