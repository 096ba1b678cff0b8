"""One colour for each mixer, the same in every picture and page; the baseline is black there."""
import zlib

from mixers import MIXERS

# of the registry's mixers in its order; each is readable on white and on black
COLOURS = (
    "#3366cc", "#dc3912", "#109618", "#e6842a", "#990099", "#0099c6", "#dd4477", "#7a9a01",
    "#8b5a2b", "#22aa99", "#6633cc", "#b8a100", "#e377c2", "#7f8c9b", "#446b8f", "#c0561f",
    "#4aa3ff", "#a05195", "#00b36b", "#f0506e", "#7d7dff", "#9c8f5a", "#c48fd6", "#5f7f00")


def colour_of(mixer):
    """The colour of a mixer, "#rrggbb"; of one that is not in the registry (a user's own) by its
    name. A layer pattern has the mean of its entries' colours."""
    parts = mixer.replace("+", ",").split(",")
    if len(parts) > 1:
        colours = [bytes.fromhex(colour_of(part.strip())[1:]) for part in parts]
        return "#" + "".join(f"{sum(shares) // len(shares):02x}" for shares in zip(*colours))
    names = list(MIXERS)
    number = names.index(mixer) if mixer in names else zlib.crc32(mixer.encode(errors="replace"))
    return COLOURS[number % len(COLOURS)]
