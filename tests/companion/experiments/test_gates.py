"""The neuron gate under the whole recipe: what is compared, on records of a known answer."""

import pytest

from companion.experiments import gates
from companion.experiments import main as job

RIGHT = {"vanilla": 1.0, "dms": 0.5, "neuron": 0.25}  # shares of the chains


@pytest.fixture
def run(tmp_path, monkeypatch):
    run = gates.open_gates("smoke", tmp_path)

    def records(one, method):
        wanted = RIGHT[method.name] * one.profile.problems * one.profile.chains
        every = [(p, c) for p in range(one.profile.problems) for c in range(one.profile.chains)]
        return [{"problem": p, "correct": number < wanted} for number, (p, _) in enumerate(every)]

    monkeypatch.setattr(job, "records", records)
    monkeypatch.setattr(job, "held_out", lambda run, name, cr, seed: dict.fromkeys(gates.HELD, cr))
    return run


def test_only_the_gate_and_what_it_needs_differ_from_the_main_recipe(run):
    main, neuron = run.variants["dms"], run.variants["neuron"]
    assert run.variants["dms"] == job.Run.of("smoke", run.root.parent).variants["dms"]
    assert neuron.retrofit.steps == main.retrofit.steps + 60
    back = neuron.changed("dms", dms={"gate": "adapter"}, retrofit={"neuron_warmup": 0, "neuron_zero": False})
    assert back == main


def test_rows_and_pairs_of_every_task_and_ratio(run):
    told = []
    found = gates.compare_gates(run, told.append)
    assert len(found["rows"]) == len(told) == 3 * 2 * 2 and len(found["pairs"]) == 3 * 2 * 3
    for row in found["rows"]:
        assert row["mean"] == pytest.approx(100 * RIGHT[row["gate"]]) and row["cr_decisions"] == row["cr"]
    for pair in found["pairs"]:
        assert pair["difference"] == pytest.approx(100 * (RIGHT[pair["a"]] - RIGHT[pair["b"]]))
        assert pair["low"] <= pair["difference"] <= pair["high"]
