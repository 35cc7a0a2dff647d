"""The smoke script on a CPU: stock torch as shipped, and the Triton kernels in the interpreter."""

import json
import os
from importlib import import_module

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when triton is first imported

import dms_kernels
from dms_kernels import smoke


@pytest.fixture
def interpreted(monkeypatch):
    """Tensors on a CPU go to the modules of ``gpu``."""
    pytest.importorskip("triton")
    if torch.cuda.is_available():
        pytest.skip("compiled kernels take no CPU tensors")
    gpu = {name: import_module(f"dms_kernels.{modules[1]}") for name, modules in dms_kernels.MODULES.items()}
    monkeypatch.setattr(dms_kernels, "on", lambda device, operation: gpu[operation])


def test_every_step_passes_on_a_cpu(capsys):
    assert smoke.main(["--device", "cpu"]) == 0
    results = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert len(results) == 8 and all(result["ok"] and result["error"] <= result["limit"] for result in results)


@pytest.mark.slow
def test_every_step_passes_with_interpreted_kernels(interpreted):
    for result in smoke.run("cpu"):
        assert result["ok"], result


def test_a_failing_step_is_reported_and_the_next_ones_run(monkeypatch, capsys):
    def fail(*_, **__):
        raise RuntimeError("no such instruction")

    monkeypatch.setattr(dms_kernels, "decode_attention", fail)
    monkeypatch.setattr(dms_kernels, "cache_append", lambda *_: None)
    assert smoke.main(["--device", "cpu"]) == 1
    results = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [result["ok"] for result in results] == [False] * 4 + [True] * 4
    assert results[1]["failed"] == "RuntimeError: no such instruction"
