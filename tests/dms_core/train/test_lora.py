import copy
import re
import shutil

import pytest
import torch

from companion.tasks.reasoner import make_tokenizer
from dms_core import checkpoint
from dms_core.checkpoint import (
    DIFFERENCE,
    GATES,
    is_checkpoint,
    load_base,
    load_gates,
    load_model,
    load_tokenizer,
    read_settings,
)
from dms_core.config import DMSConfig
from dms_core.hub_files import read_safetensors
from dms_core.model import attach
from dms_core.train import trainer
from dms_core.train.lora import add_lora, fold_lora, lora_layers, without_lora
from dms_core.train.losses import Distiller
from dms_core.train.recipe import RetrofitConfig
from dms_core.train.retrofit import retrofit

LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
IDS = torch.arange(1, 15)[None]


def documents(count: int = 4) -> list[dict]:
    g = torch.Generator().manual_seed(0)
    rows = torch.randint(1, 40, (count, 12), generator=g).tolist()
    return [{"input_ids": x, "labels": [-100] * 3 + x[3:]} for x in rows]


def trained(model, out, **changes):
    settings = {"train": "lora", "rank": 3, "final_cr": 3.0, "steps_per_unit": 3, "batch": 2, "lr": 1e-2}
    recipe = RetrofitConfig(**{**settings, **changes})
    return retrofit(model, make_tokenizer(), documents(), DMSConfig(window=2, scale=10.0), recipe, out, use_cpu=True)


def perturbed(model):
    """Adapters that change something: peft's second factor begins at zero."""
    with torch.no_grad():
        for layer in lora_layers(model).values():
            layer.lora_B["default"].weight.normal_(std=0.1)
    return model


@torch.no_grad()
def logits(model):
    return model.eval()(IDS).logits


def test_adapters_begin_without_effect_and_are_on_every_linear_layer_but_the_output(tiny_model):
    model = tiny_model(gates=False)
    before, names = logits(model), [n for n, m in model.named_modules() if n.endswith(LINEAR)]
    add_lora(model, 3)
    assert torch.equal(logits(model), before)
    assert sorted(lora_layers(model)) == sorted(names)
    assert all(p.requires_grad == ("lora_" in name) for name, p in model.named_parameters())


def test_adapters_and_gates_learn_in_fp32_on_frozen_weights_in_bf16(tiny_model):
    model = tiny_model(gates=False).bfloat16()
    add_lora(model, 3)
    attach(model, DMSConfig(window=2))
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    assert {p.dtype for p in model.parameters() if not p.requires_grad} == {torch.bfloat16}
    before = logits(model)
    fold_lora(perturbed(model))
    assert not torch.equal(logits(model), before) and model.dtype == torch.bfloat16


def test_folding_keeps_the_function_and_takes_the_adapters_off(tiny_model):
    model = tiny_model(gates=False)
    before, names = logits(model), list(model.state_dict())
    add_lora(model, 3)
    with without_lora(perturbed(model)):
        assert torch.equal(logits(model), before)
    changed = logits(model)
    assert (changed - before).abs().max() > 1e-2
    fold_lora(model)
    assert list(model.state_dict()) == names and not lora_layers(model)
    torch.testing.assert_close(logits(model), changed, atol=1e-5, rtol=1e-5)


def test_the_teacher_of_adapters_is_the_model_without_them(tiny_model):
    model = tiny_model(gates=False)
    dense = copy.deepcopy(model)
    add_lora(model, 3)
    student = attach(perturbed(model), DMSConfig(window=2)).train()
    inputs = {"input_ids": IDS, "attention_mask": torch.ones_like(IDS), "use_cache": False}
    torch.testing.assert_close(Distiller(student, None)._teacher_hidden(inputs), dense.model(IDS).last_hidden_state)
    assert all(p.requires_grad for name, p in student.named_parameters() if "lora_" in name or "dms_gate" in name)


def test_a_checkpoint_is_gates_and_a_difference_of_low_rank_on_the_frozen_base(tiny_model, tmp_path):
    base = tiny_model(gates=False)
    model = trained(copy.deepcopy(base), tmp_path)
    files = sorted(file.name for file in (tmp_path / "cr3").glob("*.safetensors"))
    assert files == sorted([GATES, DIFFERENCE]) and is_checkpoint(tmp_path / "cr2")
    for name, part in read_safetensors(tmp_path / "cr3" / DIFFERENCE).items():
        assert part.dtype == torch.float16 and 3 in part.shape, name
    loaded = load_gates(copy.deepcopy(base), tmp_path / "cr3")
    ours, theirs, old = (dict(m.named_parameters()) for m in (model, loaded, base))
    assert set(ours) == set(theirs)
    for name, p in ours.items():
        torch.testing.assert_close(theirs[name], p, atol=2e-4, rtol=0, msg=name)
        moved = name in old and not torch.equal(p, old[name])
        assert moved == (name.split(".")[-2] in LINEAR), name
    assert (logits(loaded) - logits(model)).abs().max() < 0.01


@pytest.mark.parametrize("train, files", [("lora", [DIFFERENCE, GATES]), ("gates", [GATES])])
def test_a_checkpoint_names_its_base_model_and_loads_with_it(tiny_model, tmp_path, monkeypatch, train, files):
    tiny_model(gates=False).save_pretrained(tmp_path / "base")
    model = trained(load_base(tmp_path / "base"), tmp_path / "run", train=train)
    place = tmp_path / "run" / "cr3"
    assert sorted(file.name for file in place.glob("*.safetensors")) == files
    assert (logits(load_model(place)) - logits(model)).abs().max() < 0.01
    assert torch.equal(logits(load_base(place)), logits(load_base(tmp_path / "base")))
    loaded, load = [], checkpoint.load_base
    monkeypatch.setattr(checkpoint, "load_base", lambda *names, **how: loaded.append(how) or load(*names, **how))
    load_model(place, trust_remote_code=True, cache_dir="x")
    assert loaded[-1] == {"trust_remote_code": False, "cache_dir": "x"}
    monkeypatch.undo()
    assert load_tokenizer(place).get_vocab() == make_tokenizer().get_vocab()
    (tmp_path / "base").rename(tmp_path / "elsewhere")
    tiny_model(gates=False, seed=5).save_pretrained(tmp_path / "base")
    with pytest.raises(ValueError, match=r"its base model .* has changed since it was trained"):
        load_model(place)
    shutil.rmtree(tmp_path / "base")
    with pytest.raises(ValueError, match=re.escape(f"{tmp_path / 'base'}': neither a directory nor a hub id in reach")):
        load_model(place)
    assert load_gates(load_base(tmp_path / "elsewhere"), place).dms.config.window == 2


def test_a_checkpoint_remembers_the_revision_of_its_base_model(tiny_model, tmp_path, monkeypatch):
    tiny_model(gates=False).save_pretrained(tmp_path / "base")
    asked = []
    monkeypatch.setattr(trainer, "local_directory", lambda name, **hub: asked.append(hub) or tmp_path / "base")
    trained(load_base(tmp_path / "base", revision="v1"), tmp_path / "run", train="gates")
    assert asked == [{"revision": "v1"}] and read_settings(tmp_path / "run" / "cr3")["base_revision"] == "v1"
    loaded, load = [], checkpoint.load_base
    monkeypatch.setattr(checkpoint, "load_base", lambda *names, **how: loaded.append(how) or load(*names, **how))
    load_model(tmp_path / "run" / "cr3", revision="of the gates")
    assert loaded[-1] == {"trust_remote_code": False, "revision": "v1"}


def test_rank_and_gate_that_do_not_fit_are_refused(tiny_model, tmp_path):
    with pytest.raises(ValueError, match=r"rank 0: must be >= 1"):
        RetrofitConfig(train="lora", rank=0)
    with pytest.raises(ValueError, match="train 'lora' with gate 'neuron'"):
        recipe = RetrofitConfig(train="lora")
        retrofit(tiny_model(gates=False), make_tokenizer(), documents(), DMSConfig(gate="neuron"), recipe, tmp_path)
