"""A model split over two processes says and costs what it does in one."""

import json
import os
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from forks import in_child, torchrun
from transformers import AutoModelForCausalLM, LlamaConfig, Phi3Config, Qwen3Config

from dms_core.baselines import get_baseline
from dms_core.checkpoint import load_base, load_gates, load_model, save_model, write_difference
from dms_core.config import DMSConfig
from dms_core.model import attach, detach
from dms_core.parallel import Split, split_of, tensor_parallel
from dms_core.sampling import SamplingConfig, sample_chains

VOCABULARY = 40
PROMPTS = [[3, 5, 7, 9], [4, 6], [8, 2, 11, 13, 17, 19, 23]]
JOBS = [(problem, chain) for problem in range(3) for chain in range(2)]
MODELS = {
    "llama": (LlamaConfig, DMSConfig(window=3, scale=10.0, offset=0.0)),
    "layer": (LlamaConfig, DMSConfig(window=3, scale=10.0, offset=0.0, granularity="layer")),
    "qwen3": (Qwen3Config, DMSConfig(window=3, gate="neuron", offset=0.0)),
    "phi3": (Phi3Config, DMSConfig(window=3, scale=10.0, offset=0.0)),  # one projection, gathered on every process
}
CASES = [(name, None, temperature) for name in MODELS for temperature in (0.0, 1.0)]
CASES += [("llama", method, 1.0) for method in ("vanilla", "tova", "quest", "h2o", "random")]


def make_model(config_class, settings: DMSConfig):
    torch.manual_seed(0)
    extra = {} if config_class is Phi3Config else {"head_dim": 8}
    config = config_class(
        vocab_size=VOCABULARY,
        hidden_size=64,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=8,
        num_key_value_heads=4,
        initializer_range=0.25,
        pad_token_id=0,
        bos_token_id=None,
        eos_token_id=None,
        **extra,
    )
    model = attach(AutoModelForCausalLM.from_config(config).eval(), settings)
    for parameter in model.dms.gate_parameters():
        torch.nn.init.normal_(parameter, std=1.0)
    return model


def chains(model, method: str | None, temperature: float) -> list[dict]:
    config = SamplingConfig(24, temperature, batch=4, stride=8)
    tokenizer = SimpleNamespace(pad_token_id=0, eos_token_id=1)
    baseline = None if method in (None, "vanilla") else get_baseline(method)(2.0)
    model.dms.enabled = method is None
    found = sample_chains(model, tokenizer, PROMPTS, JOBS, config, baseline)
    found = [{name: value for name, value in asdict(chain).items() if name != "seconds"} for chain in found]
    return sorted(found, key=lambda chain: (chain["problem"], chain["chain"]))


def save_adapters(directory: Path) -> None:
    """A plain model in BASE, and in ADAPTERS gates with a difference of its weights."""
    model = make_model(*MODELS["llama"])
    weights, parts = dict(model.named_parameters()), {"model.norm.weight": 0.1 * torch.randn(64)}
    for name in ("model.layers.0.self_attn.q_proj.weight", "model.layers.1.mlp.down_proj.weight"):
        rows, columns = weights[name].shape
        parts |= {f"{name}.up": 0.1 * torch.randn(rows, 2), f"{name}.down": torch.randn(2, columns)}
    write_difference(model, parts, directory / "adapters")
    detach(model).save_pretrained(directory / "base")


def with_adapters(directory: Path, **options):
    return load_gates(load_base(directory / "base", **options), directory / "adapters")


def run_split(directory: Path) -> None:
    """In each of two processes: the chains of every case, to DIRECTORY/RANK.json."""
    found = {"adapters": chains(with_adapters(directory, **tensor_parallel()), None, 1.0)}
    for name in MODELS:
        model = load_model(directory / name, **tensor_parallel())
        split = model.dms.split
        assert model.dms.heads == (4 if name == "phi3" else 2)
        assert split.agree(torch.tensor([split.rank])).item() == split.share(split.rank) == 0
        for case in (case for case in CASES if case[0] == name):
            found[str(case)] = chains(model, *case[1:])
    (directory / f"{os.environ['RANK']}.json").write_text(json.dumps(found))
    torch.distributed.destroy_process_group()


@pytest.fixture(scope="module")
def split(tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("split")
    for name, made in MODELS.items():
        save_model(make_model(*made), directory / name)
    save_adapters(directory)
    in_child(lambda: torchrun(lambda: run_split(directory)))
    return directory


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(map(str, case)))
def test_two_processes_sample_the_chains_of_one_with_equal_budgets(split, case):
    name, method, temperature = case
    alone = chains(load_model(split / name), method, temperature)
    for rank in range(2):
        assert json.loads((split / f"{rank}.json").read_text())[str(case)] == alone
    if method != "vanilla":
        assert any(chain["live"][-1] < chain["prompt_tokens"] + 22 for chain in alone)  # something was evicted


@pytest.mark.slow
def test_two_processes_add_to_their_parts_what_adapters_add_to_the_whole(split):
    alone = chains(with_adapters(split), None, 1.0)
    for rank in range(2):
        assert json.loads((split / f"{rank}.json").read_text())["adapters"] == alone
    assert chains(make_model(*MODELS["llama"]), None, 1.0) != alone


@pytest.mark.parametrize("name, method", [("llama", None), ("qwen3", None), ("llama", "vanilla"), ("llama", "tova")])
def test_layers_on_two_devices_sample_the_chains_of_one(name, method):
    """A device_map; the other device is the stand-in accelerator, which mixes with no other."""
    import shadow
    from accelerate import dispatch_model

    alone, model = (make_model(*MODELS[name]) for _ in range(2))
    parts = ("model.embed_tokens", "model.rotary_emb", "model.norm", "lm_head", "model.layers.0")
    places = {**dict.fromkeys(parts, "cpu"), "model.layers.1": str(shadow.DEVICE)}
    model = dispatch_model(model, places, main_device="cpu", force_hooks=True)
    assert {parameter.device.type for parameter in model.parameters()} == {"cpu", shadow.DEVICE.type}
    assert chains(model, method, 1.0) == chains(alone, method, 1.0)


def test_model_of_one_process_is_whole(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    assert tensor_parallel() == {} and split_of(make_model(*MODELS["llama"])) == Split()
