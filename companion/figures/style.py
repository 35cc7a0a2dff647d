"""The one figure style: a method has the same label, colour and marker in every figure, and all text has one size.

A figure is COLUMN inches wide, whatever it shows: 688 px on a desk, 358 px on a phone.  FONT is the size that has 9 px
there, so a figure names no font size of its own; panels that get too narrow go below each other.  Figures are drawn on
white; book/_static/figures.css turns them dark with the page.

Colours: each has a contrast of 3 to 1 or more to white; what colour-blind readers might confuse differs by its marker.
They are written out, since tables need the labels where seaborn is not installed.  Every ``plot_`` function of this
package takes the axes to draw on, makes or takes the current ones without, and returns them.
"""

import math

COLUMN, FONT = 7.0, 12.75  # inches, points
STYLES = {  # method → (label, colour, marker)
    "vanilla": ("vanilla", "#222222", "o"),
    "vanilla-int8": ("vanilla, 8 bits", "#949494", "o"),
    "dms": ("DMS", "#0173b2", "s"),
    "dms-int8": ("DMS, 8 bits", "#0014a3", "D"),
    "dms-gates": ("DMS, gates alone", "#0014a3", "p"),
    "dms-immediate": ("DMS, immediate eviction", "#d55e00", "v"),
    "dms-random": ("DMS, random marks", "#4f8cff", "8"),
    "dmc": ("DMC", "#205060", "<"),
    "tova": ("TOVA", "#8f1fff", "^"),
    "h2o": ("H2O", "#029e73", "D"),
    "quest": ("Quest", "#cc78bc", "P"),
    "streaming": ("sink and window", "#703410", "X"),
    "streaming-llm": ("StreamingLLM", "#703410", "X"),
    "snapkv": ("SnapKV", "#665c3d", ">"),
    "random": ("random eviction", "#949494", "+"),
    "rkv": ("R-KV", "#f5005c", "h"),
    "kvzap": ("KVzap-style threshold", "#739933", "H"),
    "random-attention": ("Random Attention", "#949494", "*"),
    "tova-protected": ("TOVA, prompt kept", "#8f1fff", "2"),
    "h2o-protected": ("H2O, prompt kept", "#029e73", "d"),
    "quest-protected": ("Quest, prompt kept", "#cc78bc", "p"),
    "streaming-llm-protected": ("StreamingLLM, prompt kept", "#703410", "x"),
    "random-protected": ("Random Attention", "#949494", "*"),
    "rkv-protected": ("R-KV, prompt kept", "#f5005c", "1"),
}
# The methods whose colours other lines take, in this order.
CYCLE = ("dms", "dms-immediate", "h2o", "tova", "streaming-llm", "quest", "random", "dmc")
RATIOS = {  # compression ratio: line and filling
    2: (":", "none"),
    3: ("-.", "left"),
    4: ("--", "top"),
    6: ((0, (5, 1, 1, 1, 1, 1)), "right"),
    8: ("-", "full"),
}
TEXT = ("font.size", "axes.labelsize", "axes.titlesize", "xtick.labelsize", "ytick.labelsize", "legend.fontsize")
TEXT += ("legend.title_fontsize", "figure.titlesize", "figure.labelsize")
DEFAULTS = {
    **dict.fromkeys(TEXT, FONT),
    "figure.figsize": (COLUMN, 4.2),
    "figure.dpi": 110,
    "figure.constrained_layout.use": True,
    "savefig.bbox": "tight",
    "axes.axisbelow": True,
    "legend.frameon": False,
    "legend.handlelength": 1.6,
    "svg.hashsalt": "dms",  # makes SVG files reproducible
}
ABOVE = {"loc": "lower left", "bbox_to_anchor": (0, 1), "borderaxespad": 0.2, "columnspacing": 1.2}


def set_style() -> None:
    """Make seaborn's theme, the palette and the font size of this book the default of matplotlib."""
    import seaborn as sns

    sns.set_theme(style="whitegrid", palette=[STYLES[name][1] for name in CYCLE], rc=DEFAULTS)


def style_of(method: str) -> tuple[str, str, str]:
    """Label, colour and marker of a method.  Raises ValueError for one without a style."""
    if method not in STYLES:
        raise ValueError(f"method {method!r}: must be one of {', '.join(STYLES)} (figures.style.STYLES has them)")
    return STYLES[method]


def look(method: str, cr: float = 1) -> dict:
    """Keywords of matplotlib's ``plot`` and ``errorbar`` for a method at a compression ratio, label included.

    Ratios of one method share colour and marker; line, filling and shade differ: the higher, the darker.
    """
    label, colour, marker = style_of(method)
    if cr == 1:
        return {"label": label, "color": colour, "marker": marker, "linestyle": "-"}
    line, fill = RATIOS.get(cr, ((0, (1, 3)), "bottom"))
    shade = shaded(colour, min(max((math.log2(cr) - 1.5) / 3, -0.2), 0.5))
    drawn = {"linestyle": line, "fillstyle": fill, "markerfacecoloralt": "white"}
    return {"label": f"{label}, CR {cr:g}", "color": shade, "marker": marker} | drawn


def shaded(colour: str, by: float) -> str:
    """A colour (#rrggbb) mixed with black (``by`` > 0) or white (< 0).

    >>> shaded("#0173b2", 0.5), shaded("#0173b2", -0.5)
    ('#003a59', '#80b9d8')
    """
    goal = 0 if by > 0 else 255
    parts = (int(colour[i : i + 2], 16) for i in (1, 3, 5))
    return "#" + "".join(f"{round(part + (goal - part) * abs(by)):02x}" for part in parts)


def legend_above(ax, ncols: int = 3, **more):
    """The legend of ``ax`` above its axes, where it covers nothing."""
    return ax.legend(**ABOVE | {"ncols": ncols} | more)
