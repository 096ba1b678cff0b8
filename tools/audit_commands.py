"""The audit's questions about what commands do with a model: build it from another seed, and make
it ready to decode."""
import copy

import torch

from tools.audit_state import note_pieces
from tools.audit_subject import Row, Worst, asked, normal
from training.chance import call
from training.leaks import limit, precision_within


def seeds(subject):
    """Building a model does not seed torch's generator, which would make the weights, those of
    other layers too, the same for every --seed."""
    if subject.trained:
        yield Row("seeds", None, "of a run: it is built")
        return
    ends = []
    with torch.random.fork_rng(devices=[]):
        for seed in (1, 2):
            subject.build(seed=seed)
            ends.append(torch.get_rng_state())
    if torch.equal(*ends):
        yield Row("seeds", False, "building the model seeds torch's generator anew: weights made "
                  "behind that are the same for every --seed")
    else:
        yield Row("seeds", True, "models of two seeds leave torch's generator in two states")


@torch.no_grad()
def ready(subject, T=71):
    """What a mixer works out in ready_to_decode() changes no output, whole or in pieces."""
    worst = Worst(limit("length"))
    found = False
    for model in subject.bare():
        for name, module in asked(model).items():
            if not hasattr(module, "ready_to_decode"):
                continue
            found = True
            x = normal(2, T, model.config.n_embd)
            most = limit("length", precision_within(module, x))
            y = call(module, x)
            prepared = copy.deepcopy(module)
            prepared.ready_to_decode()
            for sizes in ([T], [30, 1, 1, T - 32]):
                note_pieces(worst, prepared, x, y, sizes, most, name)
    if found:
        yield worst.row("ready", "ready_to_decode() changes the outputs", "; whole and in pieces")
    else:
        yield Row("ready", None, "the mixer has no ready_to_decode")
