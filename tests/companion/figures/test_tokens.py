"""Tokens of a text, coloured by who keeps them."""

import html
import itertools
import json
import re

import numpy as np
import pytest
from seaborn.utils import relative_luminance

from companion.cli.main import main
from companion.experiments.heldout import kept_tokens
from companion.figures.tokens import colours, example, kept_rows, kinds, summary, tokens_html
from companion.paths import REASONER
from companion.tasks.reasoner import load_tokenizer
from dms_core.checkpoint import load_model

TEXT = ["<|im_start|>", "user", "\n", "<b>", " &", "'x\"", " 4", "\n\n", "\t", "é", "<|im_end|>", "\n"]
SHOWN = {
    "tokens": TEXT,
    "special": "100000000010",
    "layers": 1,
    "heads": 3,
    "kept": ["111111111111", "000000000000", "100100000000"],
}
TEMPLATE = "{% for m in messages %}{{ m['content'] }}{% endfor %}"  # the reasoner's tokens are characters


def spans(page: str) -> list[tuple[str, str]]:
    """(tooltip, text as a browser shows it) of each token."""
    found = re.findall(r'<span title="([^"]*)"[^>]*>(.*?)</span>', page, re.S)
    return [(title, html.unescape(text)) for title, text in found]


def test_html_shows_every_token_once_in_order_and_escaped():
    shown = "".join(text for _, text in spans(tokens_html(SHOWN)))
    assert shown.replace("↵\n", "\n").replace("⇥\t", "\t") == "".join(TEXT)
    assert "<b>" not in tokens_html(SHOWN) and "<|im_start|>" not in tokens_html(SHOWN)
    assert "<script" not in tokens_html(SHOWN)


def test_counts_are_those_of_the_rows():
    titles = [title for title, _ in spans(tokens_html(SHOWN))]
    counts = kept_rows(SHOWN).sum((0, 1))
    assert titles == [f"kept by {count} of 3" for count in counts] and counts.tolist() == [2, 1, 1, 2] + [1] * 8
    one = [title for title, _ in spans(tokens_html(SHOWN, 0, 2))]
    assert [title == "kept" for title in one] == [bit == "1" for bit in SHOWN["kept"][2]]


def test_special_tokens_alone_have_a_border():
    bordered = re.findall(r"<span title=[^>]*border[^>]*>(.*?)</span>", tokens_html(SHOWN))
    assert list(map(html.unescape, bordered)) == ["<|im_start|>", "<|im_end|>"]


@pytest.mark.parametrize("share", np.linspace(0, 1, 41))
def test_text_has_wcag_aa_contrast_to_its_background(share):
    pair = [relative_luminance(colour) for colour in colours(share)]
    assert (max(pair) + 0.05) / (min(pair) + 0.05) >= 4.5  # WCAG 2 AA


def test_more_rows_make_a_darker_background():
    shades = [relative_luminance(colours(share)[0]) for share in np.linspace(0, 1, 31)]
    assert all(a > b for a, b in itertools.pairwise(shades))


def test_kinds_follow_the_template_and_the_text():
    expected = "template template template word punctuation word digit newline space word template template"
    assert kinds(SHOWN) == expected.split()


def test_summary_weighs_documents_by_their_tokens():
    facts = summary([SHOWN, SHOWN | {"tokens": ["7"], "special": "0", "kept": ["0", "0", "0"]}])
    assert facts["tokens"] == 13 and facts["documents"] == 2
    assert facts["retention"][0] == pytest.approx([12 / 13, 0, 2 / 13], abs=1e-5)
    assert facts["kinds"]["digit"] == {"tokens": 2, "retention": 1 / 6}
    assert sum(kind["tokens"] for kind in facts["kinds"].values()) == 13


@pytest.mark.parametrize("place", [(0, None), (None, 1), (1, 0), (0, 3), (-1, 0)])
def test_missing_head_is_rejected(place):
    with pytest.raises(ValueError, match=r"must be (both|below 1 and 3)"):
        tokens_html(SHOWN, *place)


def test_example_holds_the_models_own_decisions():
    model, tokenizer = load_model(REASONER / "dms-cr4"), load_tokenizer(REASONER)
    tokenizer.chat_template = TEMPLATE
    said = [{"role": "user", "content": "?a;b=1+2;a=b+3;>"}, {"role": "assistant", "content": "a=b+3>b=1+2=3<"}]
    shown = json.loads(json.dumps(example(model, tokenizer, said, 20)))
    text = (said[0]["content"] + said[1]["content"])[:20]
    assert "".join(shown["tokens"]) == text
    expected = kept_tokens(model, tokenizer(text)["input_ids"]).numpy()
    assert (kept_rows(shown) == expected).all() and 0 < expected.mean() < 1
    assert shown["cr_decisions"] == pytest.approx(1 / expected.mean())
    assert len(spans(tokens_html(shown))) == 20
    with pytest.raises(ValueError, match="limit 0: must be >= 1"):
        example(model, tokenizer, said, 0)
    with pytest.raises(ValueError, match="1 messages without an answer: must be"):
        example(model, tokenizer, said[:1])


@pytest.mark.parametrize(("flags", "named"), [(["--index", "1"], "0 to 0"), (["--limit", "0"], "must be >= 1")])
def test_command_rejects_index_and_limit_out_of_range(flags, named, tmp_path, capsys):
    data = tmp_path / "one.jsonl"
    data.write_text(json.dumps({"messages": []}) + "\n")
    assert main(["tokens", "--model", "m", "--gates", "g", "--data", str(data), *flags]) == 2
    assert named in capsys.readouterr().err
