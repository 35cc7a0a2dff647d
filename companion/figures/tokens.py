"""Which tokens of a text stay in the cache, as coloured HTML and as JSON that needs no model.

A row of the cache is one (layer, KV head) and decides for itself: token t stays if its alpha is 0 (paper section 3.1).
Shown are the decisions; the window, which holds the most recent tokens in any case, is left out.
"""

import html
import re
from collections.abc import Sequence

import numpy as np
from seaborn.utils import relative_luminance

from companion.experiments.heldout import kept_tokens
from dms_core.train.data import encode_conversation

KINDS = ("template", "newline", "digit", "word", "punctuation", "space")
ROLES = ("system", "user", "assistant")
_LOW, _HIGH = (0xEC, 0xEC, 0xEC), (0x01, 0x73, 0xB2)  # evicted, kept: those of plot_kept


def example(model, tokenizer, messages: Sequence[dict], limit: int = 400) -> dict:
    """The first ``limit`` tokens of a conversation and which rows keep them.  ``model`` has DMS gates.

    "tokens": their text; "special": a bit each; "kept": a bit string a row, heads of layer 0 first.
    Raises ValueError if ``limit`` < 1 or the conversation has no answer in it.
    """
    if limit < 1:
        raise ValueError(f"limit {limit}: must be >= 1")
    ids = encode_conversation(tokenizer, list(messages))[0][:limit]
    if not ids:
        raise ValueError(f"{len(messages)} messages without an answer: must be at least one with an answer")
    kept = kept_tokens(model, ids).numpy()  # (layers, KV heads, tokens)
    layers, heads, _ = kept.shape
    special = set(tokenizer.all_special_ids)
    texts = [tokenizer.decode([i], clean_up_tokenization_spaces=False) for i in ids]
    shown = {"tokens": texts, "special": "".join("01"[i in special] for i in ids), "layers": layers, "heads": heads}
    shown |= {"window": model.dms.config.window, "cr_decisions": kept.size / max(int(kept.sum()), 1)}
    return shown | {"kept": ["".join(map(str, row)) for row in kept.reshape(-1, len(ids)).astype(int)]}


def kept_rows(shown: dict) -> np.ndarray:
    """Boolean (layers, KV heads, tokens) of an ``example``."""
    return np.array([list(row) for row in shown["kept"]]).reshape(shown["layers"], shown["heads"], -1) == "1"


def kinds(shown: dict) -> list[str]:
    """One of KINDS for each token: what belongs to the chat template, else what its text holds first in their order."""
    patterns = {"newline": r"\n", "digit": r"\d", "word": r"[^\W\d_]", "punctuation": r"\S"}
    found: list[str] = []
    after_special = after_role = False
    for text, bit in zip(shown["tokens"], shown["special"], strict=True):
        named = after_special and text in (*ROLES, "\n")
        template = bit == "1" or named or (after_role and text == "\n")  # the rest of the line that names the speaker
        matching = (kind for kind, pattern in patterns.items() if re.search(pattern, text))
        found.append("template" if template else next(matching, "space"))
        after_special, after_role = bit == "1", template and text in ROLES
    return found


def summary(shown: Sequence[dict]) -> dict:
    """Of several ``example``s: "tokens", "retention" (layers, KV heads) and of each kind {"tokens", "retention"}."""
    kept = np.concatenate([kept_rows(one) for one in shown], axis=2)
    of = np.array([kind for one in shown for kind in kinds(one)])
    places = {kind: of == kind for kind in KINDS if kind in of}
    by = {kind: {"tokens": int(at.sum()), "retention": float(kept[..., at].mean())} for kind, at in places.items()}
    retention = kept.mean(2).round(5).tolist()
    return {"documents": len(shown), "tokens": len(of), "retention": retention, "kinds": by}


def tokens_html(shown: dict, layer: int | None = None, head: int | None = None) -> str:
    """A text whose tokens are coloured by the share of all rows that keep them, or by what one head does.

    shown: an ``example``.  One static element with its own colours, so that a page may be light or dark; the number
    behind each colour is in its tooltip.  ValueError if only one of ``layer`` and ``head`` is given, or out of range.
    """
    kept = kept_rows(shown)
    if (layer is None) != (head is None):
        raise ValueError(f"layer {layer}, head {head}: must be both given, or neither")
    if layer is not None and not (0 <= layer < kept.shape[0] and 0 <= head < kept.shape[1]):
        raise ValueError(f"layer {layer}, head {head}: must be below {kept.shape[0]} and {kept.shape[1]}")
    rows = kept.reshape(-1, kept.shape[2]) if layer is None else kept[layer, head][None]
    facts = zip(shown["tokens"], rows.sum(0).tolist(), shown["special"], strict=True)
    body = "".join(_token(text, count, len(rows), bit == "1") for text, count, bit in facts)
    return (
        '<div style="background:#ffffff;color:#222222;border:1px solid #bbbbbb;border-radius:4px;padding:0.6em">'
        f'{_legend(len(rows))}<div style="font-family:monospace;font-size:0.85em;line-height:1.7;'
        f'white-space:pre-wrap;overflow-wrap:anywhere">{body}</div></div>'
    )


def colours(share: float) -> tuple[str, str]:
    """Background and text for a share in [0, 1]; the text is the one of black and white that stands out more."""
    mixed = [round(low + share * (high - low)) for low, high in zip(_LOW, _HIGH, strict=True)]
    background = "#{:02x}{:02x}{:02x}".format(*mixed)
    bright = relative_luminance(background) > 0.179  # where (bright + 0.05) / 0.05 = 1.05 / (bright + 0.05)
    return background, "#000000" if bright else "#ffffff"


def _token(text: str, count: int, rows: int, special: bool) -> str:
    background, ink = colours(count / rows)
    border = f";border:1px dashed {ink}" if special else ""
    title = f"kept by {count} of {rows}" if rows > 1 else ("kept" if count else "evicted")
    visible = html.escape(text).replace("\n", "↵\n").replace("\t", "⇥\t")  # pre-wrap breaks the line at \n
    return f'<span title="{title}" style="background:{background};color:{ink}{border}">{visible}</span>'


def _legend(rows: int) -> str:
    names = {share: f"{share:.0%}".replace("%", " %") for share in (0.0, 0.25, 0.5, 0.75, 1.0)}
    what = f" of {rows} rows (layer, KV head) keep the token"
    if rows == 1:
        names, what = {0: "evicted", 1: "kept"}, " by this head"
    form = '<span style="background:{};color:{};padding:0 0.6em">{}</span>'
    cells = "".join(form.format(*colours(share), name) for share, name in names.items())
    marks = '<span style="border:1px dashed #222222;padding:0 0.3em">special token</span> ↵ newline'
    return f'<div style="font-size:0.8em;margin-bottom:0.5em">{cells}{what} &nbsp; {marks}</div>'
