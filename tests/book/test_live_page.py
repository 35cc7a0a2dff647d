"""The live page can be used: by mouse and keyboard, on a phone, in the dark, without motion, without seeing it."""

from pathlib import Path

import axe_playwright_python
import pytest

AXE = Path(axe_playwright_python.__file__).with_name("axe.min.js")

RACE = "() => DMS_PAGE.race.sides.map((s) => [s.reads, s.budget, s.chains.reduce((n, c) => n + c.reads, 0), s.over])"


def finish(tab) -> None:
    tab.wait_for_function("DMS_PAGE.over() && document.querySelector('#verdict').textContent", timeout=60_000)


def test_race_keeps_its_budget_and_tells_its_end(browser):
    tab = browser()
    tab.check("#speed input[value=Fast]")
    tab.click("#run")
    finish(tab)
    for reads, budget, summed, over in tab.evaluate(RACE):
        assert over and 0 < reads <= budget and reads == pytest.approx(summed)
    dense, sparse = tab.evaluate("() => DMS_PAGE.race.sides.map((s) => s.made / s.reads)")
    assert sparse > 2 * dense
    said = tab.inner_text("#verdict")
    assert "Dense wrote" in said and "DMS at CR 8 wrote" in said
    assert "of 1" in tab.inner_text("#score")
    assert tab.problems == []


def test_same_seed_gives_the_same_race_and_another_seed_another(browser):
    texts = "() => DMS_PAGE.race.sides.map((s) => s.chains.map((c) => c.text))"
    run = "() => { DMS_PAGE.advance(Infinity, 1e9) }"
    tab, found = browser(), []
    for seed in (0, 0, 7):
        tab.evaluate("seed => { document.getElementById('seed').value = seed; return DMS_PAGE.prepare() }", seed)
        tab.evaluate(run)
        found.append(tab.evaluate(texts))
    assert found[0] == found[1] != found[2]
    assert len(set(found[0][1])) == 2  # the chains of one side differ


def test_keyboard_steps_races_and_chooses(browser):
    tab = browser()
    tab.focus("#step")
    tab.keyboard.press("Enter")
    assert tab.evaluate("() => DMS_PAGE.race.sides[0].made") == 1
    tab.focus("#task input:checked")
    tab.keyboard.press("ArrowRight")
    tab.wait_for_function("DMS_PAGE.race.sides[0].problem.task === 'traces'")
    for name in ("Budget", "Temperature"):
        assert tab.get_by_role("slider", name=name).is_visible()
    tab.fill("#prompt", "?a;b=1;!")
    tab.wait_for_function("document.querySelector('#said').textContent.includes('has no line')")
    tab.fill("#prompt", "?a;a=b+1;b=4;!")
    tab.wait_for_function("DMS_PAGE.race.sides[0].problem.answer === '5'")
    tab.focus("#run")
    tab.keyboard.press("Enter")
    finish(tab)
    assert "5, right" in tab.inner_text("#verdict").replace("\n", " ")
    assert tab.problems == []


def test_reduced_motion_shows_results_at_once(browser):
    tab = browser(part="", reduced_motion="reduce")
    tab.wait_for_timeout(300)
    assert tab.evaluate("() => DMS_PAGE.race.clock") == 0  # nothing starts by itself
    tab.evaluate("""() => { window.shown = new Set();
      new MutationObserver(() => shown.add(document.querySelector('.counters b').textContent))
        .observe(document.querySelector('.counters b'), {childList: true}) }""")
    tab.click("#run")
    finish(tab)
    assert len(set(tab.evaluate("() => [...shown]")) - {"0"}) == 1


def test_first_race_starts_by_itself(browser):
    tab = browser(part="", viewport={"width": 1280, "height": 1000})
    tab.wait_for_function("DMS_PAGE.race.clock > 0")


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_page_fits_a_phone_and_follows_the_colour_scheme(browser, scheme):
    tab = browser(viewport={"width": 360, "height": 740}, color_scheme=scheme, device_scale_factor=2)
    assert tab.evaluate("() => document.documentElement.scrollWidth <= innerWidth")
    background = "() => getComputedStyle(document.body).backgroundColor"
    assert (tab.evaluate(background) == "rgb(255, 255, 255)") == (scheme == "light")
    tab.evaluate("() => { document.documentElement.dataset.theme = 'dark' }")
    assert tab.evaluate(background) != "rgb(255, 255, 255)"


def test_page_in_a_frame_takes_the_theme_and_tells_its_height(browser, page):
    tab = browser()
    (page / "book.html").write_text((page / "embed.html").read_text().replace("live/index.html", "index.html#still"))
    tab.goto((page / "book.html").as_uri())
    tab.wait_for_function("document.getElementById('dms-live').style.height !== '1080px'")
    tab.evaluate("() => { document.documentElement.dataset.theme = 'dark' }")
    frame = tab.frames[1]
    frame.wait_for_function("document.documentElement.dataset.theme === 'dark'")
    assert frame.evaluate("() => document.documentElement.scrollHeight <= innerHeight + 1")
    assert tab.problems == []


def test_arrow_keys_tell_what_became_of_each_token_in_each_head(browser):
    tab = browser()
    tab.evaluate("() => DMS_PAGE.advance(Infinity, 1e9)")
    tab.click("#step")  # draws
    side = tab.locator(".side.dms")
    tab.evaluate("() => DMS_PAGE.draw()")
    side.locator(".view").focus()
    tab.keyboard.press("Home")
    said = side.locator(".look").inner_text
    letter = tab.evaluate("() => DMS_PAGE.race.sides[1].prompt[0]")
    assert said().startswith(f"Token 1 “{letter}” of the problem: held by")
    states = "({row, token}) => { const c = DMS_PAGE.race.sides[1].chains[0].cache;"
    states += " return c.state[row * c.capacity + token] }"
    words = ["", "held", "marked, still in the window", "overwritten"]
    for token in range(3):
        for row in range(8):
            tab.keyboard.press("ArrowDown")
            state = words[tab.evaluate(states, {"row": row, "token": token})]
            assert said() == f"Token {token + 1} “{_letter(tab, token)}” of the problem: " + (
                f"layer {row // 2 + 1}, KV head {row % 2 + 1}: {state}"
            )
        for _ in range(8):
            tab.keyboard.press("ArrowUp")
        tab.keyboard.press("ArrowRight")
    assert side.locator(".cursor").is_visible()
    tab.keyboard.press("Tab")
    assert not side.locator(".cursor").is_visible() and said() == ""


def _letter(tab, token: int) -> str:
    return tab.evaluate("token => DMS_PAGE.race.sides[1].prompt[token]", token)


def test_window_is_a_choice_and_changes_what_is_held(browser):
    tab, live = browser(), {}
    for window in (0, 16, 64):
        tab.check(f"#delay input[value='{window}']", force=True)
        tab.wait_for_function(f"DMS_PAGE.settings.window === {window} && DMS_PAGE.race.clock === 0")
        tab.wait_for_function(f"DMS_PAGE.race.sides[1].chains[0].cache.cells === {window + 1}")
        assert tab.evaluate("() => DMS_PAGE.race.sides[0].chains[0].cache.cells") == 1  # dense: no window
        live[window] = tab.evaluate("() => DMS_PAGE.race.sides[1].chains[0].peak")
    assert live[0] < live[16] < live[64]
    assert tab.problems == []


@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1280, 360])
def test_page_has_no_fault_that_axe_finds(browser, scheme, width):
    tab = browser(viewport={"width": width, "height": 900}, color_scheme=scheme)
    tab.evaluate("() => DMS_PAGE.advance(Infinity, 1e9)")
    tab.click("#run")
    finish(tab)
    tab.click("summary")
    tab.add_script_tag(path=AXE)
    faults = tab.evaluate("axe.run()")["violations"]
    assert not faults, [(fault["id"], fault["nodes"][0]["html"]) for fault in faults]


@pytest.mark.slow
def test_models_write_fast_enough_to_watch(browser):
    """At least 200 tokens a second; of three tries the best, since other work slows a browser down."""
    tab = browser()
    write = """name => { const m = new DMS.Model(DMS_WEIGHTS[name]);
      const c = new DMS.Chain(m, m.encode(DMS_PROBLEMS.search[0]), {temperature: 0.6, topP: 0.95, seed: 1});
      const began = performance.now(); while (!c.done && c.made < 300) c.advance();
      return 1000 * c.made / (performance.now() - began) }"""
    rates = {name: max(tab.evaluate(write, name) for _ in range(3)) for name in ("dense", "cr8")}
    print({name: round(rate) for name, rate in rates.items()}, "tokens a second")
    assert min(rates.values()) >= 200
