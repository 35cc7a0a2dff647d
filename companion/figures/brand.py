"""The book's mark, favicon and social card: who sees whom in four steps, with one token evicted.

``python -m companion.figures.brand`` writes logo.svg, favicon.svg and social.png into book/_static.
"""

from pathlib import Path

import matplotlib.pyplot as plt
from matplotlib.patches import FancyBboxPatch

from companion.figures.curves import plot_curves
from companion.figures.style import set_style
from companion.paths import RESULTS, checkout
from dms_core.storage import read_json

MARK = ("w", "ww", "kww", "keww")  # queries down, keys across
COLOURS = {"w": "#56b4e9", "k": "#0173b2", "e": "#de8f05"}  # in the window, kept, evicted
TITLE, LINE = (
    "Inference-time\nhyper-scaling",
    "Teach a model what to forget, and it\ncan think longer for the same memory.",
)


def mark_svg(margin: int = 0) -> str:
    """The mark on a square of 64, around it ``margin``."""
    squares = ""
    for x, y, kind in ((x, y, kind) for y, row in enumerate(MARK) for x, kind in enumerate(row)):
        inset, look = (2, f'fill="none" stroke="{COLOURS[kind]}" stroke-width="2"') if kind == "e" else (1, "")
        look = look or f'fill="{COLOURS[kind]}"'
        at, size = f'x="{16 * x + inset}" y="{16 * y + inset}"', 16 - 2 * inset
        squares += f'<rect {at} width="{size}" height="{size}" rx="3" {look}/>'
    box = f"{-margin} {-margin} {64 + 2 * margin} {64 + 2 * margin}"
    return f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="{box}">{squares}</svg>\n'


def draw_card(file: Path) -> None:
    """1200 by 630 pixels: the mark, the title, and accuracy against KV reads in search, as data/results has it."""
    plt.switch_backend("agg")
    set_style()
    fig = plt.figure(figsize=(12, 6.3), dpi=100, layout="none")
    canvas = fig.add_axes((0, 0, 1, 1), xlim=(0, 1200), ylim=(630, 0))
    canvas.set_axis_off()
    for y, row in enumerate(MARK):
        for x, kind in enumerate(row):
            drawn = {"fc": "none", "ec": COLOURS[kind]} if kind == "e" else {"fc": COLOURS[kind], "ec": COLOURS[kind]}
            place = (70 + 28 * x, 62 + 28 * y)
            canvas.add_patch(FancyBboxPatch(place, 18, 18, "round,pad=2,rounding_size=4", linewidth=3, **drawn))
    canvas.text(64, 315, TITLE, fontsize=43, fontweight="bold", va="center", linespacing=1.15)
    canvas.text(66, 455, LINE, fontsize=19, va="center", linespacing=1.4, color="#444444")
    canvas.text(66, 572, "Dynamic Memory Sparsification, computed", fontsize=17, va="center", color=COLOURS["k"])
    points = [p for p in read_json(RESULTS / "full" / "curves.json")["points"] if p["task"] == "search"]
    ax = fig.add_axes((0.625, 0.17, 0.34, 0.62))
    plot_curves({"points": [p for p in points if p["method"] in ("dms", "vanilla")]}, "reads", ax, labelled=())
    ax.set(xlabel="KV reads per problem", ylabel="problems solved (%)")
    with plt.rc_context({"savefig.bbox": "standard"}):
        fig.savefig(file, dpi=100, metadata={"Software": None})
    plt.close(fig)


def write(folder: Path) -> None:
    """logo.svg, favicon.svg and social.png."""
    (folder / "logo.svg").write_text(mark_svg())
    (folder / "favicon.svg").write_text(mark_svg(margin=2))
    draw_card(folder / "social.png")


if __name__ == "__main__":
    write(checkout("the mark") / "book" / "_static")
