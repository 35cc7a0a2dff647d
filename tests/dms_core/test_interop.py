import json
import logging
import re
import shutil
from io import StringIO
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from dms_core.cache.dms import DMSCache
from dms_core.checkpoint import is_checkpoint, load_base, load_gates, load_model, save_model
from dms_core.config import DMSConfig
from dms_core.interop import export_adapters, export_model, is_foreign, read_foreign_settings

WINDOW, SCALE, OFFSET = 4, 100.0, 5.0
IDS = torch.randint(1, 40, (1, 24), generator=torch.Generator().manual_seed(3))
# What the configs of nvidia/Qwen3-8B-DMS-8x and of Model-Optimizer's student models hold, window aside.
NEURON_KEYS = {
    "dms_alpha_scale": SCALE,
    "dms_initial_alpha_offset": OFFSET,
    "dms_window_size": WINDOW,
    "dms_cr": 8,
    "auto_map": {
        "AutoConfig": "configuration_qwen3_dms.Qwen3Config",
        "AutoModelForCausalLM": "modeling_qwen3_dms.Qwen3ForCausalLM",
    },
}
ADAPTER_KEYS = {
    "dms_alpha_scale": SCALE,
    "dms_initial_alpha_offset": OFFSET,
    "dms_window_size": WINDOW,
    "dms_cr": 8,
    "dms_paged_attention_block_size": 256,
    "dms_disable_eviction": False,
    "dms_separate_alpha": True,
    "dms_alpha_per": "head",
    "dms_tau": 0.1,
    "dms_manual_inference_mode": False,
    "dms_chunked_prefill": None,
    "dms_preallocate_for_tokens": 4096,
    "auto_map": {
        "AutoConfig": "configuration_qwen3_dms.Qwen3ConfigDMS",
        "AutoModelForCausalLM": "modeling_qwen3_dms.Qwen3ForCausalLMDMS",
    },
}


def edit(directory: Path, **changes) -> None:
    config = {**json.loads((directory / "config.json").read_text()), **changes}
    config = {key: value for key, value in config.items() if value != "absent"}
    (directory / "config.json").write_text(json.dumps(config))


@pytest.fixture
def foreign(tiny_model, tmp_path):
    """A function that writes a tiny random checkpoint of either kind, with code that must not be run."""

    def write(kind: str, **changes) -> Path:
        directory = tmp_path / kind
        model = tiny_model("qwen3", gates=False)
        for name, p in model.named_parameters():
            if name.endswith("norm.weight"):
                torch.nn.init.uniform_(p, 0.5, 1.5)
        model.save_pretrained(directory)
        edit(directory, **{**(ADAPTER_KEYS if kind == "adapter" else NEURON_KEYS), **changes})
        if kind == "neuron":  # the published one was saved by transformers 4
            edit(directory, rope_theta=1e6, rope_scaling=None, rope_parameters="absent", torch_dtype="float32")
        for file in ("configuration_qwen3_dms.py", "modeling_qwen3_dms.py"):
            (directory / file).write_text("raise SystemExit('code of a checkpoint was executed')\n")
        if kind == "adapter":
            weights = load_file(directory / "model.safetensors")
            for layer in range(2):
                place = f"model.layers.{layer}.self_attn"
                weights[f"{place}.dms_proj_alpha.weight"] = torch.randn(2, 32) / 4
                weights[f"{place}.dms_proj_alpha_norm.weight"] = torch.rand(32) + 0.5
            save_file(weights, directory / "model.safetensors", {"format": "pt"})
        return directory

    return write


def slow_qwen3(directory: Path, ids: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """Qwen3 with DMS, transcribed in loops from the files alone: logits (T, V) and marks (layers, KV heads, T)."""
    config, w = json.loads((directory / "config.json").read_text()), load_file(directory / "model.safetensors")
    heads, kv_heads, size = config["num_attention_heads"], config["num_key_value_heads"], config["head_dim"]
    tokens, eps = len(ids), config["rms_norm_eps"]
    theta = config.get("rope_theta") or config["rope_parameters"]["rope_theta"]

    def norm(x, name):
        return x / (x.pow(2).mean(-1, keepdim=True) + eps).sqrt() * w[f"{name}.weight"]

    def rope(x, position):
        angle = position * theta ** (-torch.arange(0, size, 2) / size)
        a, b = x[: size // 2], x[size // 2 :]
        return torch.cat([a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()])

    hidden, marks = w["model.embed_tokens.weight"][ids], []
    for layer in range(config["num_hidden_layers"]):
        at, residual = f"model.layers.{layer}.self_attn", hidden
        x = norm(hidden, f"model.layers.{layer}.input_layernorm")
        q = norm((x @ w[f"{at}.q_proj.weight"].T).view(tokens, heads, size), f"{at}.q_norm")
        k = norm((x @ w[f"{at}.k_proj.weight"].T).view(tokens, kv_heads, size), f"{at}.k_norm")
        v = (x @ w[f"{at}.v_proj.weight"].T).view(tokens, kv_heads, size)
        group, separate = heads // kv_heads, config.get("dms_separate_alpha", False)
        if separate:
            alpha = norm(residual, f"{at}.dms_proj_alpha_norm") @ w[f"{at}.dms_proj_alpha.weight"].T
        else:
            alpha = q[:, ::group, -1].clone()
            q[:, ::group, -1] = 0
        z = config["dms_alpha_scale"] * alpha - config["dms_initial_alpha_offset"]  # (T, KV heads)
        if config.get("dms_alpha_per") == "layer":
            z = z[:, :1].expand(-1, kv_heads)
        out = torch.zeros(tokens, heads, size)
        for h in range(heads):
            for i in range(tokens):
                query = rope(q[i, h], i)
                if not separate and h % group == 0:
                    query[-1] = 0
                seen = [j for j in range(i + 1) if i - j <= config["dms_window_size"] or not z[j + 1, h // group] > 0]
                scores = torch.stack([query @ rope(k[j, h // group], j) for j in seen]) / size**0.5
                out[i, h] = scores.softmax(0) @ v[seen, h // group]
        hidden = residual + out.flatten(1) @ w[f"{at}.o_proj.weight"].T
        x, mlp = norm(hidden, f"model.layers.{layer}.post_attention_layernorm"), f"model.layers.{layer}.mlp"
        gate = torch.nn.functional.silu(x @ w[f"{mlp}.gate_proj.weight"].T)
        hidden = hidden + (gate * (x @ w[f"{mlp}.up_proj.weight"].T)) @ w[f"{mlp}.down_proj.weight"].T
        marks.append(torch.cat([z[1:] > 0, torch.zeros(1, kv_heads, dtype=torch.bool)]).T)  # token j + 1 decides
    return norm(hidden, "model.norm") @ w["lm_head.weight"].T, torch.stack(marks)


@pytest.mark.parametrize("kind, changes", [("neuron", {}), ("adapter", {}), ("adapter", {"dms_alpha_per": "layer"})])
@torch.no_grad()
def test_foreign_checkpoint_matches_reference_formula(foreign, kind, changes):
    directory = foreign(kind, **changes)
    model = load_model(directory)
    logits, marks = slow_qwen3(directory, IDS[0].tolist())
    ours = model(IDS).logits[0]
    decided = torch.cat([model.dms.step.evicted[layer] for layer in range(2)])
    assert not model.training and model.dms.config.gate == kind
    assert torch.equal(decided, marks) and 0.2 < marks[..., :-1].float().mean() < 0.8
    assert torch.allclose(ours, logits, atol=2e-4)
    with model.dms.disabled():
        assert not torch.allclose(model(IDS).logits[0], logits, atol=1e-2)


@pytest.mark.parametrize("kind", ["neuron", "adapter"])
@torch.no_grad()
def test_generation_with_a_cache_follows_the_full_forward(foreign, kind):
    model = load_model(foreign(kind))
    cache, ids = DMSCache.for_model(model), IDS
    out = model.generate(IDS, past_key_values=cache, max_new_tokens=12, do_sample=False)
    for _ in range(12):
        ids = torch.cat([ids, model(ids).logits[:, -1:].argmax(-1)], 1)
    assert torch.equal(out, ids)
    assert cache.live_tokens().float().mean() < 0.9 * cache.tokens_seen()


@pytest.mark.parametrize("kind", ["neuron", "adapter"])
@torch.no_grad()
def test_export_then_load_is_the_identity(foreign, tmp_path, kind):
    model = load_model(foreign(kind, dms_window_size=300))
    export_model(model, tmp_path / "out", cr=8)
    again = load_model(tmp_path / "out")
    assert again.dms.config == model.dms.config and is_foreign(tmp_path / "out")
    assert torch.equal(again(IDS).logits, model(IDS).logits)
    before, after = (load_file(place / "model.safetensors") for place in (tmp_path / kind, tmp_path / "out"))
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
    keys = {k: x for k, x in json.loads((tmp_path / "out" / "config.json").read_text()).items() if "dms" in k}
    expected = {k: x for k, x in ADAPTER_KEYS.items() if k in keys}
    expected |= {"dms_separate_alpha": kind == "adapter", "dms_window_size": 300}
    assert keys == expected and len(keys) == 8


@torch.no_grad()
def test_exported_adapters_load_on_their_base(foreign, tiny_model, tmp_path):
    model = load_model(foreign("adapter"))
    with pytest.warns(UserWarning, match="window 4: the authors' code requires"):
        export_adapters(model, tmp_path / "out")
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["config.json", "dms_adapters.safetensors"]
    (tmp_path / "adapter" / "dms.json").write_text('{"dms": {}, "model": {}}')  # read as a plain model
    base = load_gates(load_base(tmp_path / "adapter"), tmp_path / "out")
    assert torch.equal(base(IDS).logits, model(IDS).logits)
    with pytest.raises(ValueError, match=r"load_gates\(load_base"):
        load_model(tmp_path / "out")
    with pytest.raises(ValueError, match=r"holds gates for .*'qwen3'.*this model is .*'llama'"):
        load_gates(tiny_model("llama", gates=False), tmp_path / "out")


@torch.no_grad()
def test_own_format_holds_a_foreign_model_without_its_keys_or_code(foreign, tmp_path):
    model = load_model(foreign("adapter"))
    save_model(model, tmp_path / "own")
    assert not is_foreign(tmp_path / "own") and is_checkpoint(tmp_path / "own")
    assert not re.search("dms|auto_map", (tmp_path / "own" / "config.json").read_text())
    assert torch.equal(load_model(tmp_path / "own")(IDS).logits, model(IDS).logits)


def test_hub_id_loads_from_the_hub_cache(foreign, tmp_path):
    directory = foreign("adapter")
    repository = tmp_path / "hub" / "models--someone--Tiny-DMS"
    shutil.copytree(directory, repository / "snapshots" / ("0" * 40))
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("0" * 40)
    model = load_model("someone/Tiny-DMS", cache_dir=tmp_path / "hub")
    assert model.dms.config == read_foreign_settings(directory)
    with pytest.raises(ValueError, match="someone/Else': neither a directory nor a hub id in reach"):
        load_model("someone/Else", cache_dir=tmp_path / "hub")


def test_remote_code_is_not_executed_even_when_trusted(foreign):
    assert load_model(foreign("neuron"), **{"trust_remote_code": True}).dms.config.gate == "neuron"


def test_missing_keys_have_the_defaults_of_the_authors_code(foreign):
    directory = foreign("neuron", **dict.fromkeys(["dms_alpha_scale", "dms_initial_alpha_offset"], "absent"))
    edit(directory, dms_window_size="absent")
    expected = DMSConfig(gate="neuron", window=512, scale=100.0, offset=5.0, temperature=0.1, neuron=-1)
    assert read_foreign_settings(directory) == expected


@pytest.mark.parametrize(
    "key, value, allowed",
    [
        ("dms_window_size", 2.5, "an integer >= 0"),
        ("dms_window_size", True, "an integer >= 0"),
        ("dms_window_size", -1, "an integer >= 0"),
        ("dms_alpha_scale", 0, "a number > 0"),
        ("dms_alpha_scale", None, "a number > 0"),
        ("dms_initial_alpha_offset", float("nan"), "a finite number"),
        ("dms_tau", "0.1", "a number > 0"),
        ("dms_alpha_per", "token", "'head' or 'layer'"),
        ("dms_separate_alpha", 1, r"true \(adapter\) or false \(neuron\)"),
        ("dms_disable_eviction", True, r"false; .*model\.dms\.disabled"),
    ],
)
def test_wrong_value_raises_with_what_is_allowed(foreign, key, value, allowed):
    with pytest.raises(ValueError, match=rf"config\.json: {key} {re.escape(repr(value))}: must be {allowed}"):
        load_model(foreign("adapter", **{key: value}))


def test_unknown_key_is_ignored_with_a_warning(foreign):
    with pytest.warns(UserWarning, match=r"config\.json: \['dms_flavour'\] are not known"):
        read_foreign_settings(foreign("neuron", dms_flavour="mint"))


ALPHA, NORM = (f"model.layers.1.self_attn.dms_proj_alpha{part}.weight" for part in ("", "_norm"))


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda w: w.pop(ALPHA), rf"{re.escape(ALPHA)}.*missing"),
        (lambda w: w.pop(NORM), rf"{re.escape(NORM)}.*missing"),
        (lambda w: w.update({ALPHA: w[ALPHA][:1].clone()}), r"alpha\.weight has shape \(1, 32\), must be \(2, 32\)"),
        (lambda w: w[NORM].fill_(float("inf")), rf"{re.escape(NORM)} has NaN or infinite"),
        (lambda w: w.update({ALPHA.replace("weight", "bias"): torch.ones(2)}), r"dms_proj_alpha\.bias is not zero"),
        (lambda w: w.update({ALPHA.replace("1", "2"): w[ALPHA].clone()}), r"layers\.2\.self_attn.*unknown"),
        (lambda w: w.pop("model.layers.0.mlp.up_proj.weight"), "1 weights are missing"),
    ],
    ids=["alpha", "norm", "shape", "infinite", "bias", "layer", "base"],
)
def test_incomplete_or_damaged_checkpoint_raises(foreign, change, message):
    directory = foreign("adapter")
    weights = load_file(directory / "model.safetensors")
    change(weights)
    save_file(weights, directory / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=message) as error:
        load_model(directory)
    assert str(directory if "weights" in message else directory / "model.safetensors") in str(error.value)


def test_adapters_in_a_neuron_checkpoint_raise(foreign):
    with pytest.raises(ValueError, match=r"dms_proj_alpha.*unknown"):
        load_model(foreign("adapter", dms_separate_alpha=False))


def test_truncated_file_or_missing_shard_raises(foreign):
    directory = foreign("adapter")
    whole = (directory / "model.safetensors").read_bytes()
    (directory / "model.safetensors").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=r"model\.safetensors: truncated or damaged"):
        load_model(directory)
    (directory / "model.safetensors").rename(directory / "model-00001-of-00002.safetensors")
    (directory / "model-00001-of-00002.safetensors").write_bytes(whole)
    shards = {
        name: f"model-0000{1 + (name == NORM)}-of-00002.safetensors"
        for name in load_file(directory / "model-00001-of-00002.safetensors")
    }
    (directory / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": shards}))
    with pytest.raises(ValueError, match="model-00002-of-00002"):
        load_model(directory)


def test_settings_unknown_to_the_authors_code_raise_on_export(tiny_model, tmp_path):
    for settings, message in (
        ({"eviction": "immediate"}, "eviction 'immediate'.*'delayed'"),
        ({"gate": "neuron", "neuron": 0}, "neuron 0.*-1"),
    ):
        with pytest.raises(ValueError, match=message):
            export_model(tiny_model("qwen3", **settings), tmp_path / "no")
    with pytest.raises(ValueError, match="use export_model"):
        export_adapters(tiny_model("qwen3", gate="neuron"), tmp_path / "no")
    assert not (tmp_path / "no").exists()
    export_model(tiny_model("qwen3", gate="neuron", neuron=7, window=512), tmp_path / "yes")


@pytest.mark.parametrize("strange", [False, True])
def test_authors_adapters_load_quietly_and_strange_tensors_are_reported(foreign, strange):
    directory = foreign("adapter")
    if strange:
        weights = load_file(directory / "model.safetensors")
        save_file({**weights, "model.strange.weight": torch.ones(2)}, directory / "model.safetensors", {"format": "pt"})
    logger, heard = logging.getLogger("transformers"), StringIO()
    handler = logging.StreamHandler(heard)
    logger.addHandler(handler)
    try:
        load_model(directory)
    finally:
        logger.removeHandler(handler)
    assert "dms_proj_alpha" not in heard.getvalue() and ("model.strange.weight" in heard.getvalue()) == strange
    assert strange or "UNEXPECTED" not in heard.getvalue()
