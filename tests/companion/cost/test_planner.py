import json
import re
import subprocess
import sys

import pytest
from transformers import LlamaConfig, Qwen3Config

from companion.cli.main import main
from companion.cost.planner import find_architecture, lines, plan
from companion.paths import REASONER


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


def test_gates_alone_are_planned_as_the_model_that_they_go_on(tmp_path):
    note = {"dms": {}, "model": "llama", "base": str(REASONER)}
    (tmp_path / "dms.json").write_text(json.dumps(note))
    assert plan(str(tmp_path), 1, 512, 4) | {"model": None} == plan(str(REASONER), 1, 512, 4) | {"model": None}


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


GB = 1e9


def test_layers_with_a_sliding_window_hold_the_window_whatever_the_ratio():
    dense, compressed = (plan("olmo-3-7b", 1, 131072, cr) for cr in (1, 8))
    assert round(dense["kv_bytes"] / GB, 1) == 18.8  # all 32 layers would hold 68.7
    slides, full = 24 * 4096 * 16384, 8 * 131072 * 16384  # layers, tokens, bytes a token
    assert dense["kv_bytes"] == slides + full and compressed["kv_bytes"] == slides + full / 8
    assert "24 of 32 layers hold at most 4096 tokens" in "\n".join(lines(compressed))


def test_experts_count_in_memory_and_the_chosen_ones_in_a_step():
    one, many = (plan("mixtral-8x7b", batch, 4096, 1) for batch in (1, 256))
    assert round(one["parameters"] / GB, 1) == 46.7 and round(one["active_parameters"] / GB, 1) == 12.9
    embedding = 32000 * 4096
    read = one["active_parameters"] - embedding - (2 * 32 + 1) * 4096  # norms are not counted
    assert one["weight_bytes"] == 2 * read
    assert 0.999 < many["weight_bytes"] / (2 * (one["parameters"] - embedding)) < 1  # a large batch takes all 8


def test_heads_wider_than_hidden_over_heads_are_planned(tmp_path):
    sizes = dict(hidden_size=2560, intermediate_size=9728, num_hidden_layers=36, num_key_value_heads=8)
    Qwen3Config(**sizes, tie_word_embeddings=True).save_pretrained(tmp_path)
    result = plan(str(tmp_path), 2, 1000, 1)
    assert result["kv_bytes"] == 2 * 1000 * 2 * 2 * 36 * 8 * 128
    assert round(result["parameters"] / GB, 2) == 4.02
    wide = plan(str(tmp_path), 1, 2000, 1)["flops"] - plan(str(tmp_path), 1, 1000, 1)["flops"]
    assert wide == 1000 * 36 * 4 * 32 * 128  # query heads span 4096, not 2560


def test_latent_attention_leaves_nothing_to_evict():
    dense, compressed = (plan("deepseek-v3", 8, 32768, cr) for cr in (1, 8))
    assert dense["kv_bytes"] == compressed["kv_bytes"] == 8 * 32768 * 61 * (512 + 64) * 2
    assert "DMS has nothing to evict here" in lines(compressed)[-1]


def test_state_of_a_hybrid_does_not_grow():
    short, long = (plan("qwen3-next-80b-a3b", 1, context, 1)["kv_bytes"] for context in (1000, 2000))
    growth = 12 * 1000 * 2 * 2 * 2 * 256  # full-attention layers, tokens, K and V, bytes, 2 heads of 256
    assert long - short == growth and short > growth


def test_paper_models_have_the_parameters_that_transformers_counts():
    from transformers import Qwen2Config

    from companion.cost.count import count

    heads = dict(num_hidden_layers=28, num_attention_heads=12, num_key_value_heads=2)
    counted = count(Qwen2Config(vocab_size=151936, hidden_size=1536, intermediate_size=8960, **heads))
    assert counted == find_architecture("qwen-r1-1.5b")
