"""The base model's training script: a run that was stopped between its stages goes on to the same weights."""

import importlib.util
import json
from dataclasses import replace

import pytest
import torch

from companion.paths import REASONER
from companion.tasks.reasoner import make_model, make_tokenizer
from dms_core.checkpoint import load_base


@pytest.fixture
def script(monkeypatch):
    spec = importlib.util.spec_from_file_location("train_reasoner", REASONER / "train.py")
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(__import__("sys").modules, "train_reasoner", module)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "TOKENS_PER_STEP", 1024)
    stages = tuple(module.Stage(name, ((0, 1e-3), (2, 0.0))) for name in ("traces", "mixture"))
    monkeypatch.setitem(module.SIZES, "small", module.Size(128, stages))
    return module


def test_a_run_resumed_after_its_first_stage_ends_with_the_same_weights(script, tmp_path, monkeypatch):
    whole, parts, small = tmp_path / "whole", tmp_path / "parts", script.SIZES["small"]
    for out in (whole, parts):
        out.mkdir()
    script.Training(whole, 0, resume=False).run()
    monkeypatch.setitem(script.SIZES, "small", replace(small, stages=small.stages[:1]))
    script.Training(parts, 0, resume=False).run()
    first = load_base(parts).state_dict()
    monkeypatch.setitem(script.SIZES, "small", small)
    script.Training(parts, 0, resume=True).run()
    one, other = load_base(whole).state_dict(), load_base(parts).state_dict()
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert any(not torch.equal(first[name], other[name]) for name in first)
    logs = [[json.loads(line) for line in (out / "train_log.jsonl").read_text().splitlines()] for out in (whole, parts)]
    one, other = ([(row["stage"], row["step"], row["loss"]) for row in log] for log in logs)
    assert one == other
    assert [row["stage"] for row in logs[0]] == ["traces", "mixture"]


def test_no_prompt_that_is_evaluated_is_in_a_batch_of_the_second_stage(script):
    drawn = script.SIZES["small"].stages[1].pool(0, 0)
    assert {document.prompt[0] for document in drawn} == {"?", "<", ">"}
    assert script.overlap(0, problems=20, retrofits=0)["in_training"] == []


def test_the_larger_model_has_four_times_the_weights_and_is_stored_in_fp16(script, tmp_path):
    large = script.SIZES["large"]
    stages = tuple(replace(stage, rate=((0, 1e-3), (1, 1e-3))) for stage in large.stages[:1])
    script.SIZES["large"] = replace(large, stages=stages)
    training = script.Training(tmp_path, 0, resume=False, size="large")
    training.run()
    counts = [make_model(len(make_tokenizer()), 0, size.width).num_parameters() for size in script.SIZES.values()]
    assert 3.8 < counts[1] / counts[0] < 4.2 and load_base(tmp_path).num_parameters() == counts[1]
    stored, trained = load_base(tmp_path).state_dict(), training.model.state_dict()
    assert all(torch.equal(stored[name], trained[name].half().float()) for name in trained)
    assert (tmp_path / "model.safetensors").stat().st_size < 2.02 * counts[1]
