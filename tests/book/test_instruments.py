"""The book's instruments compute what the library computes, and can be used: by mouse and keyboard, on a phone, in the
dark, without seeing them, from a file and with no network."""

import json
from itertools import product
from pathlib import Path

import axe_playwright_python
import numpy as np
import pytest
import torch

from companion.cost import planner, roofline
from companion.figures.instruments import TITLES, instrument, roofline_data
from companion.figures.tokens import kept_rows
from companion.paths import RESULTS
from dms_core.budgets import pareto
from dms_core.cache.dms import DMSLayer
from dms_core.config import DMSConfig
from dms_core.gate import soft_decisions
from dms_core.noise import _logistic
from dms_core.visibility import align_decisions, visible

AXE = Path(axe_playwright_python.__file__).with_name("axe.min.js")
SUMMARY = json.loads((RESULTS / "full" / "curves.json").read_text())
EXAMPLE = json.loads((RESULTS / "smollm2-tokens.json").read_text())["example"]
HYBRID = roofline.Architecture(
    *(6, 2048, 0, 512, 50000),
    kinds=(
        (2, roofline.Layer(10_000_000, 1024, 4096, evicts=True)),
        (3, roofline.Layer(9_000_000, 1024, 4096, limit=4096, expert=3_000_000, experts=64, chosen=4)),
        (1, roofline.Layer(8_000_000, state=2_000_000)),
    ),
)


@pytest.fixture(scope="module")
def show(pages, open_file):
    """A function that opens an instrument: (name, **options of a context) -> tab."""

    def show(name, **options):
        tab = open_file(pages / f"{name}.html", **options)
        tab.wait_for_selector(".instrument[data-ready] svg")
        return tab

    return show


def calls(tab, function: str, cases: list) -> list:
    """What a JavaScript function returns for each case, spread into its arguments."""
    return tab.evaluate(f"(cases) => cases.map((case_) => ({function})(...case_))", cases)


def said(tab) -> str:
    return " ".join(tab.locator(".said").all_inner_texts())


def slide(tab, label: str, key: str, times: int = 1) -> None:
    tab.get_by_role("slider", name=label).focus()
    for _ in range(times):
        tab.keyboard.press(key)


# What they compute.


def test_mask_is_the_rule_of_visibility(show):
    rng, cases, wanted = np.random.default_rng(0), [], []
    for _ in range(300):
        length, window = int(rng.integers(1, 24)), int(rng.integers(0, 9))
        lag = (1, window, int(rng.integers(0, window + 2)))[rng.integers(3)]
        marks = rng.random(length) < rng.random()
        evicted = align_decisions(_said(marks, lag), lag, None, False)
        wanted.append(visible(evicted, window)[0, 0].tolist())
        cases.append([marks.tolist(), window, lag])
    assert calls(show("mask"), "DMS_INSTRUMENTS.mask.visible", cases) == wanted


@pytest.mark.parametrize("eviction", ["delayed", "immediate"])
def test_slots_are_those_of_the_cache(show, eviction):
    rng, cases, wanted = np.random.default_rng(1), [], []
    for _ in range(40):
        length, config = int(rng.integers(1, 20)), DMSConfig(window=int(rng.integers(0, 7)), eviction=eviction)
        marks = rng.random(length) < rng.random()
        cases.append([marks.tolist(), config.window])
        wanted.append(_cache_slots(_said(marks, config.lag)[0, 0], config))
    assert calls(show("mask"), "DMS_INSTRUMENTS.mask.slots", cases) == wanted


def _said(marks: np.ndarray, lag: int) -> torch.Tensor:
    """Marks of the tokens that they are about, as the gates of the tokens that decide say it: (1, 1, T)."""
    gates = torch.zeros(1, 1, len(marks), dtype=torch.bool)
    gates[..., lag:] = torch.from_numpy(marks[: max(len(marks) - lag, 0)])
    return gates


def _cache_slots(gates: torch.Tensor, config: DMSConfig) -> list[list[int]]:
    """Who lies in which slot of a row after each token; a token's key is its position."""
    layer, one, history = DMSLayer(config, page=4), torch.ones(1, 1, 1, 1), []
    for t, evict in enumerate(gates):
        key, value = layer.update(t * one, one)
        layer.attend(one, key, value, evict.view(1, 1, 1), torch.ones(1, 1, dtype=torch.bool), scale=1.0)
        history.append(layer.rows.read()[0][0, : int(layer.rows.length[0]), 0].int().tolist())
    return history


def test_gate_and_its_gradients_are_the_library_s(show):
    rng = np.random.default_rng(2)
    z, noise = rng.uniform(-6, 6, (2, 400))
    tau, share = 10 ** rng.uniform(-1.3, 0.3, 400), rng.uniform(0.01, 0.99, 400)
    logit, temperature, before = (torch.tensor(x) for x in (z, tau, share))
    logit.requires_grad_()
    beta, hard = soft_decisions(logit, torch.tensor(noise), temperature)
    after = torch.stack([before.logit() + beta, torch.zeros_like(beta)]).softmax(0)[0]  # of two keys
    slopes = [torch.autograd.grad(x.sum(), logit, retain_graph=True)[0] for x in (hard, beta, after)]
    found = calls(show("gate"), "DMS_INSTRUMENTS.gate.gate", np.stack([z, noise, tau, share], 1).tolist())
    names = ("alpha", "beta", "hard", "probability", "share", "countSlope", "biasSlope", "shareSlope")
    alpha = torch.sigmoid((logit + torch.tensor(noise)) / temperature)
    for name, want in zip(names, (alpha, beta, hard.round(), logit.sigmoid(), after, *slopes), strict=True):
        np.testing.assert_allclose([x[name] for x in found], want.detach().numpy(), rtol=1e-9, atol=1e-12, err_msg=name)


def test_noise_is_the_library_s(show):
    uniforms = torch.linspace(0, 1, 101, dtype=torch.float64)
    found = calls(show("gate"), "DMS_INSTRUMENTS.gate.noise", uniforms[:, None].tolist())
    np.testing.assert_allclose(found, _logistic(uniforms.clone()).numpy(), rtol=1e-12, atol=1e-12)


def test_roofline_is_the_planner_s(show, monkeypatch):
    monkeypatch.setitem(roofline.ARCHITECTURES, "hybrid", HYBRID)
    grid = list(product(roofline.ARCHITECTURES, roofline.DEVICES, (1, 3, 64, 512), (1024, 32768, 131072), (1, 3, 8)))
    data = roofline_data({"hybrid": HYBRID})
    call = """([data, grid]) => grid.map(([model, device, ...rest]) =>
      DMS_INSTRUMENTS.roofline.plan(data.models[model], data.devices[device], ...rest, data.reserved))"""
    plans = show("roofline").evaluate(call, [data, grid])
    for (model, device, batch, context, cr), found in zip(grid, plans, strict=True):
        wanted = planner.plan(model, batch, context, cr, device)
        assert found == pytest.approx({name: wanted[name] for name in found}, rel=1e-12)
        assert {"latency_s", "tokens_per_s", "kv_latency_share", "kv_bytes", "largest_batch"} <= set(found)


def test_frontiers_and_margins_are_those_of_pareto(show):
    rng, cases, wanted = np.random.default_rng(3), [], []
    for _ in range(200):
        a, b = (
            np.stack([rng.choice([1.0, 2, 3, 5, 8, 13, 21], n), rng.integers(0, 9, n) * 12.5], 1)
            for n in rng.integers(1, 12, 2)
        )
        log = bool(rng.integers(2))
        cases.append([a.tolist(), b.tolist(), log])
        wanted.append((pareto.frontier(a).tolist(), pareto.margin(a, b, "log2" if log else "linear")))
    call = """(a, b, log) => { const m = DMS_INSTRUMENTS.budget, [x, y] = [m.frontier(a), m.frontier(b)];
      return [x, m.margin(x, y, log, ...m.common(x, y))] }"""
    for (vertices, margin), found in zip(wanted, calls(show("budget"), call, cases), strict=True):
        assert found == [vertices, None if margin is None else pytest.approx(margin, abs=1e-9)]


def test_margins_and_best_configurations_are_those_of_the_stored_summary(show):
    rows = [row for row in SUMMARY["margins"] + SUMMARY["margins_per_cr"] if row["b"] == "vanilla" and row["value"]]
    parts = [part for row in rows for part in (row, row["restricted"]) if part]
    asked = []
    for row in rows:
        curves = [_points(row["task"], row["a"], row.get("cr")), _points(row["task"], "vanilla")]
        pairs = [[[p[row["axis"]], p["accuracy"]] for p in curve] for curve in curves]
        for part in (row, row["restricted"]):
            if part:
                asked.append([*pairs, row["scale"] == "log2", part["from"], part["to"]])
    call = """(a, b, ...rest) => { const m = DMS_INSTRUMENTS.budget;
      return m.margin(m.frontier(a), m.frontier(b), ...rest) }"""
    tab = show("budget")
    np.testing.assert_allclose(calls(tab, call, asked), [part["value"] for part in parts], atol=1e-6)

    for row in SUMMARY["headline"]:
        for method, side in ((row["a"], "a"), (row["b"], "b")):
            points = _points(row["task"], method)
            budget = row["budget"] * (1 + 1e-9)  # a point's own, which sums in another order round otherwise
            found = tab.evaluate("(x) => DMS_INSTRUMENTS.budget.best(...x)", [points, row["axis"], budget])
            chosen = row[f"chosen_{side}"]
            assert (found or {}).get("accuracy") == row[f"best_{side}"]
            assert not chosen or [found[key] for key in ("cr", "L", "W")] == [chosen[key] for key in ("cr", "L", "W")]
    equals = [{"accuracy": 50, "reads": reads} for reads in (8, 4, 6, 20)]
    assert tab.evaluate("(x) => DMS_INSTRUMENTS.budget.best(...x)", [equals, "reads", 10])["reads"] == 4


def test_tokens_are_filled_by_the_rows_that_keep_them(show):
    kept, tab = kept_rows(EXAMPLE), show("tokens")
    assert calls(tab, "DMS_INSTRUMENTS.tokens.counts", [[EXAMPLE["kept"], None]]) == [kept.sum((0, 1)).tolist()]
    for layer, head in ((0, 0), (7, 2), (29, 1)):
        found = calls(tab, "DMS_INSTRUMENTS.tokens.counts", [[EXAMPLE["kept"], 3 * layer + head]])
        assert found == [kept[layer, head].astype(int).tolist()]
    assert f"All 90 rows together keep {100 * kept.mean():.1f} %" in said(tab)


def _points(task: str, method: str, cr: float | None = None) -> list[dict]:
    return [p for p in SUMMARY["points"] if (p["task"], p["method"]) == (task, method) and cr in (None, p["cr"])]


# How they are used.


def test_mask_is_marked_and_stepped_by_keyboard(show):
    tab = show("mask")
    slide(tab, "Newest token", "Home")
    assert said(tab).startswith("Token 0 “b” sees 1 of 1 and takes a new slot: the window is not full yet")
    tokens = tab.locator(".tokens button")
    tokens.first.focus()
    tab.keyboard.press("Space")
    tab.keyboard.press("ArrowRight")
    tab.keyboard.press("Enter")
    assert [tokens.nth(i).get_attribute("aria-pressed") for i in (0, 1)] == ["true", "false"]
    slide(tab, "Newest token", "ArrowRight", 5)
    assert "Token 5 “=” sees 5 of 6 and takes slot 0 over from token 0 “b”" in said(tab)
    tab.get_by_role("button", name="Step", exact=True).click()
    assert "Token 6 “b” sees 6 of 7 and takes a new slot: token 1 “=” leaves the window, is not marked" in said(tab)
    assert "3 more tokens read it after that" in said(tab)
    tab.get_by_label("delayed").focus()
    tab.keyboard.press("ArrowRight")
    assert "Token j + 4 decides about token j; no later token reads it" in said(tab)
    slide(tab, "Window w", "ArrowRight", 2)
    assert "Token j + 6 decides" in said(tab) and tab.get_by_label("immediate").is_checked()
    slide(tab, "Window w", "Home")
    assert "Token j + 0 decides" in said(tab)
    assert tab.problems == []


def test_click_in_the_mask_chooses_the_newest_token(show):
    tab = show("mask")
    box = tab.locator(".panels svg").first.bounding_box()
    tab.mouse.click(box["x"] + 0.3 * box["width"], box["y"] + 0.5 * box["height"])
    assert said(tab).startswith("Token 7 ")
    assert tab.problems == []


def test_gate_says_what_the_sliders_make_of_it(show):
    tab = show("gate")
    slide(tab, "Logit z", "End")
    assert "count says evict" in said(tab) and "99.8 % of draws evict" in said(tab)
    slide(tab, "Noise g", "Home")
    assert "α = 0.500, so the count says keep; β = −0.69" in said(tab)  # z + g = 0
    slide(tab, "Noise g", "ArrowRight")
    assert "α = 0.731, so the count says evict" in said(tab)  # 0.1 above 0 at temperature 0.1
    tab.get_by_role("button", name="No noise").click()
    assert "Noise g: 0.0" in tab.inner_text(".instrument")
    assert tab.problems == []


def test_roofline_follows_model_and_sliders(show):
    tab = show("roofline")
    tab.get_by_role("combobox", name="Model").select_option("qwen-r1-7b")
    tab.get_by_role("combobox", name="Device").select_option("h200")
    slide(tab, "Batch", "Home")
    slide(tab, "Context", "End")
    slide(tab, "Compression ratio", "ArrowLeft", 4)
    dense, dms = (planner.plan("qwen-r1-7b", 1, 131072, cr, "h200") for cr in (1, 4))
    text = said(tab)
    assert f"takes {1e3 * dense['latency_s']:.3g} ms dense and {1e3 * dms['latency_s']:.3g} ms with DMS at CR 4" in text
    cells = tab.locator("tbody tr").nth(5).locator("td").all_inner_texts()
    assert cells[:2] == [str(dense["largest_batch"]), str(dms["largest_batch"])]
    assert tab.problems == []


def test_budget_line_is_dragged_and_keyed(show):
    tab = show("budget")
    row = next(
        row for row in SUMMARY["headline"] if (row["task"], row["axis"]) == ("traces", "peak") and row["b"] == "vanilla"
    )
    tab.get_by_label("traces").check(force=True)
    tab.get_by_label("peak tokens", exact=True).check(force=True)
    same = [found for found in SUMMARY["margins"] if all(found[key] == row[key] for key in ("task", "axis", "a", "b"))]
    margin = {found["scale"]: found for found in same}
    chosen = row["chosen_a"]
    assert f"dense {row['best_b']:.1f} % with 1-544" in said(tab)
    assert f"DMS {row['best_a']:.1f} % with {chosen['W']}-{chosen['L']}-{chosen['cr']}" in said(tab)
    assert f"difference +{row['gain']:.1f} points" in said(tab)
    assert f"(log axis): +{margin['log2']['value']:.1f} points" in said(tab)
    tab.get_by_role("button", name="From where half").click()
    assert f"(log axis): +{margin['log2']['restricted']['value']:.1f} points" in said(tab)
    tab.get_by_label("linear").check(force=True)
    assert f"(linear axis): +{margin['linear']['restricted']['value']:.1f} points" in said(tab)

    before, box = said(tab), tab.locator(".drag svg").bounding_box()
    x = float(tab.locator('.drag line[stroke="var(--marked)"]').get_attribute("x1")) + box["x"]
    tab.mouse.move(x, box["y"] + 60)
    tab.mouse.down()
    tab.mouse.move(x + 90, box["y"] + 60, steps=4)
    tab.mouse.up()
    assert float(tab.locator('.drag line[stroke="var(--marked)"]').get_attribute("x1")) + box["x"] == pytest.approx(
        x + 90
    )
    assert said(tab) != before
    slide(tab, "Budget:", "Home")
    assert "nothing measured is so cheap" in said(tab)
    slide(tab, "Margin from", "End")
    assert "Margin: none" in said(tab)
    assert tab.problems == []


def test_a_row_of_tokens_is_chosen_by_slider_and_by_click(show):
    tab, kept = show("tokens"), kept_rows(EXAMPLE)
    slide(tab, "Layer", "ArrowRight", 2)
    assert tab.get_by_label("one row").is_checked()
    slide(tab, "KV head", "End")
    assert said(tab).startswith(f"Layer 2, KV head 2 keeps {100 * kept[2, 2].mean():.1f} % of 400 tokens")
    assert f"to be remembered: {int(kept[2, 2, 3:5].sum())} of 2" in said(tab)
    title = tab.locator(".text span").nth(10).get_attribute("title")
    assert title == ("kept" if kept[2, 2, 10] else "evicted")
    tab.locator("svg g").nth(3 * 7 + 1).click()
    assert said(tab).startswith("Layer 7, KV head 1 ")
    tab.get_by_label("all rows").check(force=True)
    assert said(tab).startswith("All 90 rows")
    assert "".join(tab.locator(".text span").all_text_contents()).replace("↵\n", "\n") == "".join(EXAMPLE["tokens"])
    assert tab.problems == []


@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1280, 360])
@pytest.mark.parametrize("name", TITLES)
def test_instrument_fits_its_page_and_has_no_fault_that_axe_finds(show, name, width, scheme):
    tab = show(name, viewport={"width": width, "height": 800}, color_scheme=scheme, reduced_motion="reduce")
    assert tab.evaluate("() => document.documentElement.scrollWidth <= innerWidth")
    paper = "() => getComputedStyle(document.querySelector('.instrument')).backgroundColor"
    assert (tab.evaluate(paper) == "rgb(255, 255, 255)") == (scheme == "light")
    for _ in range(2 if scheme == "light" else 1):  # as the system has it, then as the book's theme says: dark
        tab.add_script_tag(path=AXE)
        faults = tab.evaluate("axe.run()")["violations"]
        assert not faults, [(fault["id"], fault["nodes"][0]["html"]) for fault in faults]
        tab.evaluate("(theme) => { document.documentElement.dataset.theme = theme }", "dark")
    assert tab.evaluate(paper) != "rgb(255, 255, 255)"
    assert tab.problems == []


def test_without_javascript_a_sentence_stands_there(pages, open_file):
    for name, title in TITLES.items():
        tab = open_file(pages / f"{name}.html", java_script_enabled=False)
        assert title in tab.inner_text(".instrument")


def test_instruments_are_small_and_refuse_what_they_cannot_show():
    data = {"budget": SUMMARY, "tokens": EXAMPLE}
    assert all(len(instrument(name, data.get(name)).data) < 120_000 for name in TITLES)
    with pytest.raises(ValueError, match="instrument 'clock': must be one of"):
        instrument("clock")
    with pytest.raises(ValueError, match="must be a summary"):
        instrument("budget")
    with pytest.raises(ValueError, match="must be left out"):
        instrument("mask", {})
