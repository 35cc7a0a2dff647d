"""Which tokens of a text stay in the cache, as coloured HTML and as JSON that needs no model.

A row of the cache is one (layer, KV head) and decides for itself: token t stays if its alpha is 0 (paper section 3.1).
Shown are the decisions; the window, which holds the most recent tokens in any case, is left out.
"""

import html
import re
from collections.abc import Sequence

import numpy as np

from companion.experiments.heldout import kept_tokens
from dms_core.train.data import encode_conversation

KINDS = ("template", "newline", "digit", "word", "punctuation", "space")
ROLES = ("system", "user", "assistant")
_LOW, _HIGH = (0xEC, 0xEC, 0xEC), (0x01, 0x73, 0xB2)  # evicted, kept: those of report.plot_kept


def example(model, tokenizer, messages: Sequence[dict], limit: int = 400) -> dict:
    """The first ``limit`` tokens of a conversation and which rows keep them.  ``model`` has DMS gates.

    "tokens": their text; "special": a bit each; "kept": a bit string a row, heads of layer 0 first.
    ValueError if ``limit`` < 1 or the conversation has no answer in it.
    """
    if limit < 1:
        raise ValueError(f"limit is {limit}; allowed: >= 1")
    ids = encode_conversation(tokenizer, list(messages))[0][:limit]
    if not ids:
        raise ValueError(f"a conversation of {len(messages)} messages without an answer; allowed: at least one")
    kept = kept_tokens(model, ids).numpy()
    special = set(tokenizer.all_special_ids)
    return {
        "tokens": [tokenizer.decode([i], clean_up_tokenization_spaces=False) for i in ids],
        "special": "".join("01"[i in special] for i in ids),
        "layers": kept.shape[0], "heads": kept.shape[1], "window": model.dms.config.window,
        "cr_decisions": kept.size / max(int(kept.sum()), 1),
        "kept": ["".join(map(str, row)) for row in kept.reshape(-1, len(ids)).astype(int)],
    }  # fmt: skip


def kept_rows(shown: dict) -> np.ndarray:
    """Boolean (layers, KV heads, tokens) of an ``example``."""
    rows = np.array([[bit == "1" for bit in row] for row in shown["kept"]])
    return rows.reshape(shown["layers"], shown["heads"], -1)


def kinds(shown: dict) -> list[str]:
    """One of KINDS for each token: what belongs to the chat template, else what its text holds first in their order."""
    found: list[str] = []
    patterns = {"newline": r"\n", "digit": r"\d", "word": r"[^\W\d_]", "punctuation": r"\S"}
    for at, text in enumerate(shown["tokens"]):
        after_special = at > 0 and shown["special"][at - 1] == "1"
        after_role = at > 0 and found[-1] == "template" and shown["tokens"][at - 1] in ROLES
        template = (
            shown["special"][at] == "1"
            or (after_special and text in (*ROLES, "\n"))
            or (after_role and text == "\n")  # the rest of the line that names the speaker
        )
        matching = (kind for kind, pattern in patterns.items() if re.search(pattern, text))
        found.append("template" if template else next(matching, "space"))
    return found


def summary(shown: Sequence[dict]) -> dict:
    """Of several ``example``s: "tokens", "retention" (layers, KV heads) and of each kind {"tokens", "retention"}."""
    kept = np.concatenate([kept_rows(one) for one in shown], axis=2)
    of = np.array([kind for one in shown for kind in kinds(one)])
    return {
        "documents": len(shown), "tokens": len(of), "retention": kept.mean(2).round(5).tolist(),
        "kinds": {
            kind: {"tokens": int((of == kind).sum()), "retention": float(kept[..., of == kind].mean())}
            for kind in KINDS if (of == kind).any()
        },
    }  # fmt: skip


def tokens_html(shown: dict, layer: int | None = None, head: int | None = None) -> str:
    """A text whose tokens are coloured by the share of all rows that keep them, or by what one head does.

    shown: an ``example``.  One static element with its own colours, so that a page may be light or dark; the number
    behind each colour is in its tooltip.  ValueError if only one of ``layer`` and ``head`` is given, or out of range.
    """
    kept = kept_rows(shown)
    if (layer is None) != (head is None):
        raise ValueError(f"layer is {layer} and head {head}; allowed: both, or neither")
    if layer is not None and not (0 <= layer < kept.shape[0] and 0 <= head < kept.shape[1]):
        raise ValueError(f"layer {layer}, head {head}; allowed: below {kept.shape[0]} and {kept.shape[1]}")
    rows = kept.reshape(-1, kept.shape[2]) if layer is None else kept[layer, head][None]
    body = [
        _token(text, int(count), len(rows), special == "1")
        for text, special, count in zip(shown["tokens"], shown["special"], rows.sum(0), strict=True)
    ]
    return (
        '<div style="background:#ffffff;color:#222222;border:1px solid #bbbbbb;border-radius:4px;padding:0.6em">'
        f'{_legend(len(rows))}<div style="font-family:monospace;font-size:0.85em;line-height:1.7;'
        f'white-space:pre-wrap;overflow-wrap:anywhere">{"".join(body)}</div></div>'
    )


def colours(share: float) -> tuple[str, str]:
    """Background and text for a share in [0, 1]; the text is the one of black and white that stands out more."""
    background = [round(low + share * (high - low)) for low, high in zip(_LOW, _HIGH, strict=True)]
    bright = luminance(background) > 0.179  # where (bright + 0.05) / 0.05 = 1.05 / (bright + 0.05)
    return "#{:02x}{:02x}{:02x}".format(*background), "#000000" if bright else "#ffffff"


def luminance(rgb: Sequence[int]) -> float:
    """Relative luminance of WCAG 2, in [0, 1]."""
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in (x / 255 for x in rgb)]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def _token(text: str, count: int, rows: int, special: bool) -> str:
    background, ink = colours(count / rows)
    border = f";border:1px dashed {ink}" if special else ""
    title = f"kept by {count} of {rows}" if rows > 1 else ("kept" if count else "evicted")
    visible = html.escape(text).replace("\n", "↵\n").replace("\t", "⇥\t")  # pre-wrap breaks the line at \n
    return f'<span title="{title}" style="background:{background};color:{ink}{border}">{visible}</span>'


def _legend(rows: int) -> str:
    names = (
        {0.0: "0 %", 0.25: "25 %", 0.5: "50 %", 0.75: "75 %", 1.0: "100 %"} if rows > 1 else {0: "evicted", 1: "kept"}
    )
    cells = []
    for share, name in names.items():
        background, ink = colours(share)
        cells.append(f'<span style="background:{background};color:{ink};padding:0 0.6em">{name}</span>')
    what = f" of {rows} rows (layer, KV head) keep the token" if rows > 1 else " by this head"
    marks = '<span style="border:1px dashed #222222;padding:0 0.3em">special token</span> ↵ newline'
    return f'<div style="font-size:0.8em;margin-bottom:0.5em">{"".join(cells)}{what} &nbsp; {marks}</div>'
