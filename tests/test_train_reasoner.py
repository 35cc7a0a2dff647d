"""The base model's training script: a run that was stopped between its stages goes on to the same weights."""

import importlib.util
import json

import pytest
import torch

from companion.paths import REASONER
from dms_core.checkpoint import load_base


@pytest.fixture
def script(monkeypatch):
    spec = importlib.util.spec_from_file_location("train_reasoner", REASONER / "train.py")
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(__import__("sys").modules, "train_reasoner", module)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "TOKENS_PER_STEP", 1024)
    monkeypatch.setattr(
        module, "STAGES", tuple(module.Stage(name, ((0, 1e-3), (2, 0.0))) for name in ("traces", "mixture"))
    )
    return module


def test_a_run_resumed_after_its_first_stage_ends_with_the_same_weights(script, tmp_path, monkeypatch):
    whole, parts, stages = tmp_path / "whole", tmp_path / "parts", script.STAGES
    for out in (whole, parts):
        out.mkdir()
    script.Training(whole, 0, resume=False).run()
    monkeypatch.setattr(script, "STAGES", stages[:1])
    script.Training(parts, 0, resume=False).run()
    first = load_base(parts).state_dict()
    monkeypatch.setattr(script, "STAGES", stages)
    script.Training(parts, 0, resume=True).run()
    one, other = load_base(whole).state_dict(), load_base(parts).state_dict()
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert any(not torch.equal(first[name], other[name]) for name in first)
    logs = [[json.loads(line) for line in (out / "train_log.jsonl").read_text().splitlines()] for out in (whole, parts)]
    one, other = ([(row["stage"], row["step"], row["loss"]) for row in log] for log in logs)
    assert one == other
    assert [row["stage"] for row in logs[0]] == ["traces", "mixture"]


def test_no_prompt_that_is_evaluated_is_in_a_batch_of_the_second_stage(script):
    drawn = script.STAGES[1].pool(0, 0)
    assert {document.prompt[0] for document in drawn} == {"?", "<", ">"}
    assert script.overlap(0, size=20)["in_training"] == 0
