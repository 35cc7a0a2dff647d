import json
import re
import subprocess
import sys

import pytest
from transformers import LlamaConfig

from companion.cli.main import main
from companion.cost.planner import plan


def test_plan_of_llama_8b_has_the_papers_share_and_bytes(capsys):
    command = ["plan", "--model", "llama-3.1-8b", "--batch", "256", "--context", "8192", "--cr", "8", "--json"]
    assert main(command) == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert round(result["kv_latency_share"], 2) == 0.70  # Fig. 9, the last of its printed row
    assert f"{result['weight_bytes']:.2e}" == "1.50e+10"
    assert result["kv_bytes"] == 256 * 8192 / 8 * result["kv_bytes_per_token"]
    assert result["kv_bytes_per_token"] == 2 * 2 * 32 * 1024  # K and V, 2 bytes, layers, width
    assert result["retrofit_h100_hours"] == 700


def test_eight_fold_compression_fits_eight_times_the_sequences():
    dense, compressed = (plan("qwen-r1-7b", 1, 32768, cr) for cr in (1, 8))
    assert 8 * dense["largest_batch"] <= compressed["largest_batch"] <= 8 * dense["largest_batch"] + 7
    assert compressed["tokens_per_s"] > dense["tokens_per_s"]


def test_model_larger_than_the_device_has_batch_zero():
    assert plan("qwen-r1-32b", 1, 1 << 20, 1)["largest_batch"] == 0


def test_directory_with_a_config_is_planned(tmp_path):
    LlamaConfig(
        vocab_size=128256,
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
    ).save_pretrained(tmp_path)
    same = {"retrofit_h100_hours": None, "model": None}
    assert plan(str(tmp_path), 4, 4096, 2) | same == plan("llama-3.1-8b", 4, 4096, 2) | same


@pytest.mark.parametrize(
    "arguments, message",
    [
        ("--model llama-9b", "model 'llama-9b': neither one of llama-3.1-8b, .*nor a hub id"),
        ("--model llama-3.1-8b --batch 0", "batch 0: must be >= 1"),
        ("--model llama-3.1-8b --cr 0.5", "cr 0.5: must be >= 1"),
        ("--model llama-3.1-8b --device tpu", r"device 'tpu': must be one of \['a100', 'h100', 'h200'\]"),
    ],
)
def test_bad_arguments_are_named(arguments, message, capsys):
    assert main(["plan", *arguments.split()]) == 2
    assert re.search(message, capsys.readouterr().err)


def test_builtin_model_imports_no_numeric_library():
    code = "import sys; from companion.cost.planner import lines, plan; lines(plan('qwen3-8b', 1, 1024, 2));"
    code += "print({'numpy', 'pandas', 'torch', 'transformers'} & sys.modules.keys())"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "set()\n"


def test_unreachable_hub_id_is_one_request_and_a_value_error(monkeypatch):
    import huggingface_hub
    from huggingface_hub.errors import LocalEntryNotFoundError

    asked = []

    def download(name, allow_patterns):
        asked.append((name, allow_patterns))
        raise LocalEntryNotFoundError("no network")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    monkeypatch.setattr("transformers.AutoConfig.from_pretrained", lambda *_: pytest.fail("must not be called"))
    with pytest.raises(ValueError, match=r"model 'acme/llama-9b': neither one of .*nor a hub id that can be reached"):
        plan("acme/llama-9b", 1, 1024, 1)
    assert asked == [("acme/llama-9b", ["config.json"])]
