"""The soak in short: the same checks on 40 chains."""

import random

from companion.experiments import soak


def test_a_short_soak_loses_no_page_and_ends_with_nothing_held():
    found = soak.soak(chains=40, batch=8, length=48, every=50)
    assert found["pages_lost"] == 0
    assert found["at_the_end"] == {"live_tokens": 0, "bytes_held": 0, "caches": 1}
    assert found["tokens"] >= 40 * 40 and len(found["series"]) >= 2 * soak.BLOCKS
    held = [look[2] for look in found["series"]]
    assert held[-1] <= found["most_bytes_held"] == max(held)
    assert max(held[len(held) // 2 :]) <= 1.1 * max(
        held[: len(held) // 2]
    )  # refilled rows take the pages that are there


def test_pages_that_a_refilled_row_does_not_give_back_are_counted(monkeypatch):
    def release(rows, at) -> None:
        for name in ("length", "seen", "reads"):  # and not ``owned``
            getattr(rows, name)[at] = 0

    monkeypatch.setattr("dms_core.cache.pages.PagedRows.release", release)
    assert soak.soak(chains=24, batch=4, length=8, every=4)["pages_lost"] > 0


def test_slope_tells_growth_from_noise():
    rng, x = random.Random(0), range(400)
    noise = [1e8 + rng.gauss(0, 1e6) for _ in x]
    flat, grows = soak.slope(x, noise), soak.slope(x, [y + 3e4 * i for i, y in zip(x, noise, strict=True)])
    assert flat["low"] < 0 < flat["high"] and 2e4 < grows["low"] < grows["slope"] < grows["high"] < 4e4
    assert soak.slope(x, [5] * 400) == {"slope": 0, "low": 0, "high": 0}
