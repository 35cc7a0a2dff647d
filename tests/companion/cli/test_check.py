"""``dms check``: a directory or a model type, each check with its verdict, a refusal with its reason."""

import json

import pytest

from companion.cli.main import main
from companion.families import tiny_model
from companion.paths import REASONER
from dms_core.check import CHECKS

FIELDS = {"model", "checks", "refused"}


def said(capsys) -> dict:
    return json.loads(capsys.readouterr().out.splitlines()[-1])


def test_family_passes_and_lists_every_check(capsys):
    assert main(["check", "--family", "qwen3_next"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == len(CHECKS) and all(line.startswith("pass  ") for line in lines)


def test_directory_is_checked_and_the_result_is_json(capsys):
    assert main(["check", "--model", str(REASONER / "dms-cr4"), "--json"]) == 0
    result = said(capsys)
    assert set(result) == FIELDS and result["refused"] is None and all(result["checks"].values())


def test_refused_family_says_why_and_has_status_1(capsys):
    assert main(["check", "--family", "diffllama", "--json"]) == 1
    result = said(capsys)
    assert result["refused"].startswith("DiffLlamaForCausalLM: layer 0 attends more than once") and not result["checks"]


def test_failed_check_says_by_how_much_and_has_status_1(capsys, monkeypatch):
    monkeypatch.setattr("dms_core.attention.SINKS", ())  # attention that forgets the sinks
    assert main(["check", "--family", "gpt_oss"]) == 1
    assert "FAIL  silent gates are the original: differs by" in capsys.readouterr().out


@pytest.mark.parametrize("arguments", [[], ["--family", "llama", "--model", "x"]])
def test_exactly_one_of_model_and_family(arguments, capsys):
    assert main(["check", *arguments]) == 2
    assert "give one of --model and --family" in capsys.readouterr().err


def test_dtype_is_no_choice(capsys):
    """Rounding to bf16 flips decisions near zero, which says nothing about the model."""
    assert main(["check", "--family", "llama", "--dtype", "bfloat16"]) == 2
    assert "No such option: --dtype" in capsys.readouterr().err


def test_model_is_left_as_it_was():
    from dms_core.check import check

    model = tiny_model("lfm2").train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    assert check(model).passes and model.training and not hasattr(model, "dms")
    assert all((tensor == before[name]).all() for name, tensor in model.state_dict().items())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert all(p.grad is None for p in model.parameters())


def test_model_that_attach_takes_and_a_forward_pass_breaks_has_failed_and_is_not_refused(monkeypatch):
    from dms_core.check import check

    def broken(*args, **kwargs):
        raise ValueError("no such thing")

    monkeypatch.setattr("dms_core.attention.train_attention", broken)
    model = tiny_model("llama")
    report = check(model)
    assert report.refused is None and not report.passes
    assert report.details == {"runs with gates": "ValueError: no such thing"} and not hasattr(model, "dms")
