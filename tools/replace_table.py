"""The table and the picture of what tools.replace has measured."""
import math
import statistics

from matplotlib.colors import LogNorm

from tools.colours import colour_of
from tools.drawing import FONT, label_ends, new_figure, plain, save

SHOWN = 6     # most layers that are named as those that mind least
FLOOR = 1e-3  # of the picture: less is drawn there


def bits(losses, record):
    """Bits per byte of losses in nats per token."""
    return statistics.mean(losses) / math.log(2) / record["settings"]["bytes_per_token"]


def counts_in(record):
    return sorted({int(k) for arm in record["arms"].values() for k in arm["together"]})


def order_of(record):
    """The arms that have figures, the least loss with the most layers replaced first."""
    last = {}
    for name, arm in record["arms"].items():
        if arm["together"]:
            k = max(arm["together"], key=int)
            last[name] = -int(k), bits(arm["together"][k]["losses"], record)
    return sorted(last, key=last.get)


def table(record):
    """The lines to print."""
    settings, softmax = record["settings"], record["softmax"]
    if softmax is None:
        return "nothing is measured yet"
    base = bits(softmax["losses"], record)
    counts = counts_in(record)
    lines = [
        f"{settings['init_from']} on {settings['dataset']}, {settings['windows']} windows of "
        f"{settings['block_size']} tokens of its validation split: softmax attention in all "
        f"{settings['n_layer']} layers {base:.4f} bits per byte{keys_words(softmax)}",
        "",
        "bits per byte above it with another mixer in k layers, those that mind least on other "
        "text (+- two standard errors over the windows)",
        f"{'k layers replaced:':20}" + "".join(f"{k:>18}" for k in counts)]
    for name in order_of(record):
        cells = [difference_cell(record, name, k) for k in counts]
        lines.append(f"{name:20}" + "".join(f"{cell:>18}" for cell in cells))
    lines += ["", f"pass keys found, of {settings['prompts']} (nats per token of the answer)"]
    for name in order_of(record):
        cells = [keys_cell(record["arms"][name], k) for k in counts]
        lines.append(f"{name:20}" + "".join(f"{cell:>18}" for cell in cells))
    n = settings["decode_tokens"]
    lines += ["", f"all layers replaced, after {n:,} tokens; those that mind least alone, and most",
              f"{'':20}{'state, bytes':>16}{'of softmax':>12}{'times as fast':>16}  layers"]
    for name in order_of(record):
        lines.append(f"{name:20}{cost_cells(record['arms'][name])}  "
                     f"{minding(record['arms'][name], softmax)}")
    return "\n".join([*lines, *kept_lines(record), *tuned_lines(record)])


def keys_words(softmax):
    if softmax["keys"] is None:
        return ""
    return f"; pass keys found {softmax['keys']['right']:.2f} ({softmax['keys']['loss']:.2f})"


def difference(record, name, k):
    """(bits per byte above softmax, two standard errors) of an arm, or None."""
    found = record["arms"][name]["together"].get(str(k))
    losses = record["softmax"]["losses"]
    if found is None or len(found["losses"]) != len(losses):
        return None
    paired = [bits([a], record) - bits([b], record) for a, b in zip(found["losses"], losses)]
    spread = statistics.stdev(paired) if len(paired) > 1 else math.nan
    return statistics.mean(paired), 2 * spread / math.sqrt(len(paired))


def difference_cell(record, name, k):
    found = difference(record, name, k)
    return "-" if found is None else f"{found[0]:+.3f} +- {found[1]:.3f}"


def keys_cell(arm, k):
    found = arm["together"].get(str(k))
    if found is None or found["keys"] is None:
        return "-"
    return f"{found['keys']['right']:.2f} ({found['keys']['loss']:.1f})"


def cost_cells(arm):
    found = arm["decoding"]
    if found is None:
        return f"{'-':>16}{'-':>12}{'-':>16}"
    share = found["state_bytes"] / max(found["softmax_state_bytes"], 1)
    return f"{found['state_bytes']:>16,}{share:>12.3f}{found['times_as_fast']:>16.2f}"


def minding(arm, softmax):
    """The layers in the order in which they mind, the first and the last few."""
    if arm["alone"] is None:
        return "-"
    order = sorted(range(len(arm["alone"])), key=arm["alone"].__getitem__)
    least, most = order[:SHOWN], order[SHOWN:][-SHOWN // 2:]
    worst = arm["alone"][order[-1]] - softmax["select"]
    return f"{' '.join(map(str, least))} .. {' '.join(map(str, most))} ({worst:+.2f} nats)"


def kept_lines(record):
    """Of Top-Theta, what it keeps in rows of more tokens than it should keep."""
    lines = []
    for name in order_of(record):
        for k, found in sorted(record["arms"][name]["together"].items(), key=lambda x: int(x[0])):
            if found["kept"]:
                kept = found["kept"]
                lines.append(f"{name}, {k} layers: of {kept['visible']:.0f} scores a row it keeps "
                             f"{kept['kept']:.1f}, and reads {kept['read']:.1f} rows of V")
    return ["", *lines] if lines else []


def tuned_lines(record):
    if not record["tuned"]:
        return []
    lines = ["", "after training, all parameters (bits per byte)"]
    for name, found in record["tuned"].items():
        lines.append(f"{name:20} {len(found['layers'])} layers replaced: {found['before']:.4f} -> "
                     f"{found['after']:.4f} after {found['tokens']:,} tokens at {found['rate']:g}")
    return lines


# The picture --------------------------------------------------------------------------------------

def draw(record, path):
    """Bits per byte above softmax over the number of layers replaced, and what each layer alone
    costs. Returns the path."""
    figure, [[together], [alone]] = new_figure(6.6, rows=2)
    looks = {name: {"color": colour_of(record["arms"][name]["options"].get("mixer", name)),
                    "linestyle": style_of(name, record)} for name in order_of(record)}
    draw_together(together, record, looks)
    draw_alone(alone, record, looks)
    settings = record["settings"]
    figure.suptitle(f"{plain(settings['init_from'])} on {plain(settings['dataset'])}, attention "
                    f"replaced without any training; less than {FLOOR:g} is drawn there",
                    fontsize=FONT + 1)
    return save(path, figure)


def draw_together(ax, record, looks):
    ends = {}
    for name, look in looks.items():
        points = [(k, difference(record, name, k)) for k in counts_in(record)]
        points = [(k, max(found[0], FLOOR), found[1]) for k, found in points if found is not None]
        ax.errorbar(*zip(*points), marker="o", markersize=3, **look)
        ends[name] = *points[-1][:2], look["color"]
    ax.set_yscale("log")
    ax.set_ylim(FLOOR / 1.2, ax.get_ylim()[1])
    ax.yaxis.set_major_formatter("{x:g}")
    ax.set_xticks(counts_in(record))
    ax.set_xlabel("layers replaced, those that mind least", fontsize=FONT)
    ax.set_ylabel("bits per byte above softmax attention", fontsize=FONT)
    label_ends(ax, ends)


def draw_alone(ax, record, looks):
    """A row an arm, a column a layer."""
    names = [name for name in looks if record["arms"][name]["alone"]]
    rows = [[max(loss - record["softmax"]["select"], FLOOR) for loss in
             record["arms"][name]["alone"]] for name in names]
    ax.grid(False)
    ax.set_xlabel("the one layer replaced", fontsize=FONT)
    if not names:
        return
    norm = LogNorm(FLOOR, max(10 * FLOOR, *map(max, rows)))
    image = ax.imshow(rows, norm=norm, cmap="magma_r", aspect="auto", interpolation="nearest")
    ax.set_yticks(range(len(names)), map(plain, names))
    for label, name in zip(ax.get_yticklabels(), names):
        label.set_color(looks[name]["color"])
    bar = ax.figure.colorbar(image, ax=ax, format="{x:g}")
    bar.set_label("nats per token above softmax attention", fontsize=FONT)
    bar.ax.tick_params(labelsize=FONT)


def style_of(name, record):
    """Arms of one mixer share its colour and differ in their lines."""
    mixer = record["arms"][name]["options"].get("mixer")
    alike = [n for n, arm in record["arms"].items() if arm["options"].get("mixer") == mixer]
    return ("-", "--", ":", "-.")[alike.index(name) % 4]
