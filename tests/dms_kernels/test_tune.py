"""Tiles chosen by time, with a clock of the test's own."""

import os

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when triton is first imported

pytest.importorskip("triton")

from dms_kernels.gpu import tune
from dms_kernels.gpu.common import Launch

SLOW, FAST, TOO_LARGE = Launch(64, 64, 4, 2), Launch(128, 64, 8, 3), Launch(128, 128, 8, 5)


@pytest.fixture(autouse=True)
def forgetful(monkeypatch):
    monkeypatch.setattr(tune, "_known", {})


def clock(calls):
    def time_of(launch):
        calls.append(launch)
        if launch == TOO_LARGE:
            raise RuntimeError("out of resource: shared memory")
        return {SLOW: 2.0, FAST: 1.0}[launch]

    return time_of


def test_fastest_launch_is_chosen_once_and_remembered_in_the_file(tmp_path, monkeypatch):
    store, calls = tmp_path / "new" / "tiles.json", []
    candidates = [SLOW, TOO_LARGE, FAST, SLOW]
    assert tune.choose(store, "a", candidates, clock(calls)) == FAST
    assert calls == [SLOW, TOO_LARGE, FAST]
    assert tune.choose(store, "a", candidates, clock(calls)) == FAST and len(calls) == 3
    monkeypatch.setattr(tune, "_known", {})  # as another process
    assert tune.choose(store, "a", candidates, clock(calls)) == FAST and len(calls) == 3
    assert tune.choose(store, "b", [SLOW], clock(calls)) == SLOW and len(calls) == 4
    assert sorted(tune._read(store)) == ["a", "b"]


def test_first_launch_is_used_where_none_runs(tmp_path):
    assert tune.choose(tmp_path / "tiles.json", "a", [TOO_LARGE], clock([])) == TOO_LARGE
    assert not (tmp_path / "tiles.json").exists()


def test_a_capture_takes_what_was_chosen_before_and_times_nothing(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a card")

    class OnACard:
        device, dtype, shape = torch.device("cuda"), torch.bfloat16, (1, 4, 4096, 64)

    assert tune.best("forward", OnACard, 100, SLOW, None) == SLOW
    monkeypatch.setattr(tune, "choose", lambda store, key, *_: tune._known.setdefault((str(store), key), FAST))
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    assert tune.best("forward", OnACard, 100, SLOW, None) == FAST
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert tune.best("forward", OnACard, 100, SLOW, None) == FAST


@pytest.mark.parametrize("content", ["", "{", '{"a": [1, 2]}'])
def test_damaged_file_is_measured_anew(tmp_path, content):
    store = tmp_path / "tiles.json"
    store.write_text(content)
    assert tune.choose(store, "a", [SLOW, FAST], clock([])) == FAST


def test_choice_survives_a_directory_that_cannot_be_written(tmp_path):
    (tmp_path / "file").touch()
    calls = []
    for _ in range(2):
        assert tune.choose(tmp_path / "file" / "tiles.json", "a", [SLOW, FAST], clock(calls)) == FAST
    assert len(calls) == 2


def test_file_is_named_after_the_card(monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", "/cache")
    assert str(tune.store_of("NVIDIA H100 80GB HBM3")) == "/cache/dms_kernels/tiles-nvidia-h100-80gb-hbm3.json"


def test_table_holds_off_the_device():
    def run(_):
        raise AssertionError("launched to be timed")

    assert tune.best("forward", torch.zeros(1, 1, 4096, 64, dtype=torch.bfloat16), 100, SLOW, run) == SLOW
