"""The one figure style: a method has the same label, colour and marker in every figure.

Colours are seaborn's colour-blind palette, written out: tables need the labels where seaborn is not installed.  Every
``plot_`` function of this package takes the axes to draw on, makes or takes the current ones without, and returns them.
"""

STYLES = {  # method → (label, colour, marker)
    "vanilla": ("vanilla", "#222222", "o"),
    "dms": ("DMS", "#0173b2", "s"),
    "dms-immediate": ("DMS, immediate eviction", "#d55e00", "v"),
    "tova": ("TOVA", "#de8f05", "^"),
    "h2o": ("H2O", "#029e73", "D"),
    "quest": ("Quest", "#cc78bc", "P"),
    "streaming": ("sink and window", "#ca9161", "X"),
    "streaming-llm": ("StreamingLLM", "#ca9161", "X"),
    "snapkv": ("SnapKV", "#ece133", ">"),
    "dmc": ("DMC", "#56b4e9", "<"),
    "random": ("random eviction", "#949494", "*"),
    "tova-protected": ("TOVA, prompt kept", "#de8f05", "2"),
    "h2o-protected": ("H2O, prompt kept", "#029e73", "d"),
    "quest-protected": ("Quest, prompt kept", "#cc78bc", "p"),
    "streaming-llm-protected": ("StreamingLLM, prompt kept", "#ca9161", "x"),
    "random-attention": ("Random Attention", "#949494", "*"),
    "rkv": ("R-KV", "#fbafe4", "h"),
    "kvzap": ("KVzap-style threshold", "#ece133", "H"),
    "dms-random": ("DMS, random marks", "#56b4e9", "8"),
}
SIZES = {"figure.figsize": (7, 4.5), "figure.dpi": 110, "savefig.bbox": "tight", "axes.axisbelow": True}


def set_style() -> None:
    """Make seaborn's theme, the palette and the font sizes of this book the default of matplotlib."""
    import matplotlib.pyplot as plt
    import seaborn as sns

    sns.set_theme(context="notebook", style="whitegrid", palette="colorblind", font_scale=0.9)
    plt.rcParams.update(SIZES | {"svg.hashsalt": "dms"})  # the salt makes SVG files reproducible


def style_of(method: str) -> tuple[str, str, str]:
    """Label, colour and marker of a method.  Raises ValueError for one without a style."""
    if method not in STYLES:
        raise ValueError(f"method {method!r}: must be one of {', '.join(STYLES)} (figures.style.STYLES has them)")
    return STYLES[method]
