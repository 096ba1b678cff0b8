"""A model with softmax attention of which some layers get another mixer, with the same weights.

    replaced = Replaced(model, {"mixer": "lln"}, seed=1)
    replaced.put_in([0, 3])
    replaced.fit(x)            # what the mixer measures on text
    loss = model.loss(x, y)
    replaced.put_in([])        # the model as it was

Queries, keys, values and the output keep their projections, which are shared, not copied: of
grouped heads too, as every mixer here takes them. What a mixer has besides starts as it does in
training (Linformer's slots near the mean, Performer's features drawn from the seed), but for what
is measured on text, layer after layer, so that each sees what it will see: LLN's moments are those
of its queries and keys, Top-Theta's thresholds come from tools.calibrate.
"""
from dataclasses import replace

import torch

from base.command_line import one_line
from base.errors import BadInput
from mixers import MIXERS
from mixers.lln import Moments
from mixers.toptheta import TopTheta
from tools.calibrate import ExactTopK, hooked


class Replaced:
    """See above. options: {option: value} of the mixer that takes the place, "mixer" among them."""

    def __init__(self, model, options, seed):
        self.model = model
        self.originals = [block.mixer for block in model.blocks]
        self.norms = [block.norm1 for block in model.blocks]
        try:
            self.config = replace(model.config, **options)
        except ValueError as error:
            raise BadInput(f"{options['mixer']}: {one_line(error)}") from error
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.substitutes = [substitute(self.config, layer, original)
                                for layer, original in enumerate(self.originals)]

    def put_in(self, layers):
        """These layers have the substitute, the others the original."""
        for i, block in enumerate(self.model.blocks):
            block.mixer = self.substitutes[i] if i in layers else self.originals[i]
            block.norm1 = self.norms[i] if block.mixer is not None else None

    @torch.no_grad()
    def fit(self, x):
        """Sets what the substitutes that are in measure on text, from tokens x (B, T)."""
        def measure(mixer, args):
            fit(mixer, args[0])

        mixers = [block.mixer for block in self.model.blocks]
        handles = [mixer.register_forward_pre_hook(measure) for mixer in mixers
                   if mixer is not None and mixer in self.substitutes]
        self.model.hidden(x)
        for handle in handles:
            handle.remove()

    def fit_layer(self, i, h):
        """The same of one substitute, from what comes to its block, h (B, T, C)."""
        if self.substitutes[i] is not None:
            fit(self.substitutes[i], self.model.blocks[i].norm1(h))

    def pattern(self, layers):
        """The option `mixer` of the model in which these layers are replaced."""
        names = [self.config.mixer if i in layers else self.model.config.mixer
                 for i in range(len(self.originals))]
        return names[0] if len(set(names)) == 1 else ",".join(names)


def substitute(config, layer, original):
    """The mixer of a config with another one's projections; None for pelican, which has none."""
    builder = MIXERS[config.mixer]
    if builder is None:
        return None
    mixer = builder(config, layer)
    if not fits(mixer, original):
        raise BadInput(f"{config.mixer} has no place for attention's projections; choose mixers "
                       "with the same queries, keys and values")
    mixer.c_attn.proj, mixer.c_proj = original.c_attn.proj, original.c_proj
    if hasattr(mixer, "be_neutral"):
        mixer.be_neutral()
    mixer.to(original.c_proj.weight)
    return mixer.eval()


def fits(mixer, original):
    """Whether a mixer's projections are of the same shapes as another one's."""
    for name in ("c_attn.proj", "c_proj"):
        try:
            shapes = [m.get_submodule(name).weight.shape for m in (mixer, original)]
        except AttributeError:
            return False
        if shapes[0] != shapes[1]:
            return False
    return getattr(mixer.c_attn, "sizes", None) == original.c_attn.sizes


def fit(mixer, x):
    """Sets what a mixer measures on text, if anything, from its inputs x (B, T, C)."""
    if isinstance(mixer, TopTheta):
        collector = ExactTopK(mixer.thresholds)
        with hooked([mixer], [collector]):
            mixer.forward(x)  # not as a call: the hook that brought us here would come again
        collector.set(mixer.thresholds)
    moments = [module for module in mixer.modules() if isinstance(module, Moments)]
    if moments:
        mixer.train()
        mixer.forward(x)
        mixer.eval()
        for module in moments:
            module.update(decay=0)
