import json
import math
import sys
import warnings
from dataclasses import asdict

import pytest
import torch
from transformers import TrainerCallback

from companion import families
from companion.tasks.reasoner import make_tokenizer
from dms_core.baselines.dmc import DMCConfig, attach_dmc
from dms_core.cache.dms import DMSCache
from dms_core.checkpoint import is_checkpoint, load_model, read_settings
from dms_core.config import DMSConfig
from dms_core.model import attach
from dms_core.storage import read_json
from dms_core.train.optim import make_optimizer
from dms_core.train.recipe import RetrofitConfig
from dms_core.train.retrofit import pad_collate, retrofit
from dms_core.train.schedule import checkpoint_dir

module = sys.modules["dms_core.train.retrofit"]  # the package exports the function of that name
DMS = DMSConfig(window=2, scale=10.0)
RECIPE = RetrofitConfig(
    final_cr=3.0, steps_per_unit=3, rests=((2.0, 2),), batch=2, optimizer="muon", lr=1e-2, save_steps=3, warmup=1
)
OPTIONS = {"use_cpu": True}


def documents(count: int = 5) -> list[dict]:
    """Five documents: with two a step, batches of an epoch are not all equal and epochs end inside the run."""
    g = torch.Generator().manual_seed(0)
    ids = [torch.randint(1, 40, (int(n),), generator=g).tolist() for n in torch.randint(8, 16, (count,), generator=g)]
    return [{"input_ids": x, "labels": [-100] * 3 + x[3:]} for x in ids]


def run(tiny_model, out, recipe=RECIPE, dms=DMS, **options):
    return retrofit(tiny_model(gates=False), make_tokenizer(), documents(), dms, recipe, out, **OPTIONS, **options)


class StopAt(TrainerCallback):
    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            raise KeyboardInterrupt


def interrupt(monkeypatch, step: int):
    class Interrupted(module.RetrofitTrainer):
        def __init__(self, *args, callbacks, **kwargs) -> None:
            super().__init__(*args, callbacks=[*callbacks, StopAt(step)], **kwargs)

    monkeypatch.setattr(module, "RetrofitTrainer", Interrupted)


@pytest.mark.every(5)
@pytest.mark.parametrize("order", ["sequential", "random"])
@pytest.mark.parametrize(
    "train, gate, more",
    [
        ("all", "adapter", {}),
        ("all", "neuron", {}),
        ("gates", "adapter", {}),
        ("lora", "adapter", {"rank": 2}),
        ("all", "neuron", {"gate_lr": 3e-3, "neuron_warmup": 1, "neuron_zero": True}),
        ("all", "neuron", {"gate_lr": 3e-3, "neuron_warmup": 3, "neuron_zero": True}),  # zero as it is resumed
        ("all", "neuron", {"gate_lr": 3e-3, "neuron_warmup": 4, "neuron_zero": True, "decay": 4}),
    ],
)
def test_resumed_run_has_the_weights_of_an_uninterrupted_one(
    tiny_model, tmp_path, monkeypatch, order, train, gate, more
):
    recipe = RetrofitConfig(**{**vars(RECIPE), "train": train, **more})
    dms = DMSConfig(**{**vars(DMS), "gate": gate})
    options = {"train_sampling_strategy": order}
    whole = run(tiny_model, tmp_path / "whole", recipe, dms, **options).state_dict()
    with monkeypatch.context() as patch:
        interrupt(patch, 5)  # after the checkpoint of step 3, inside an epoch
        with pytest.raises(KeyboardInterrupt):
            run(tiny_model, tmp_path / "cut", recipe, dms, **options)
    assert not (tmp_path / "cut" / "retrofit.json").exists()
    resumed = run(tiny_model, tmp_path / "cut", recipe, dms, **options).state_dict()
    assert all(torch.equal(weight, resumed[name]) for name, weight in whole.items())
    again = run(tiny_model, tmp_path / "cut", recipe, dms, **options).state_dict()  # nothing is left to do
    assert all(torch.equal(weight, again[name]) for name, weight in whole.items())
    fresh = tiny_model(gates=False).state_dict()
    moved = [name for name, weight in fresh.items() if not torch.equal(weight, whole[name])]
    assert bool(moved) == (train != "gates")
    if train == "gates":
        assert all(whole[name].abs().sum() > 0 for name in whole if "dms_gate.proj" in name)


def test_run_saves_a_checkpoint_at_each_integer_ratio(tiny_model, tmp_path):
    model = run(tiny_model, tmp_path)
    assert sorted(d.name for d in tmp_path.glob("cr*")) == ["cr2", "cr3"]
    assert [read_settings(checkpoint_dir(tmp_path, cr))["step"] for cr in (2, 3)] == [5, 8]
    ids = torch.arange(1, 15)[None]
    with torch.no_grad():
        assert torch.equal(load_model(tmp_path / "cr3")(ids).logits, model(ids).logits)
        assert not torch.equal(load_model(tmp_path / "cr2")(ids).logits, model(ids).logits)
    facts = json.loads((tmp_path / "retrofit.json").read_text())
    assert facts["dms"] == DMS.to_dict() and facts["recipe"]["steps"] == 8


def test_stop_cr_gives_the_longer_runs_checkpoint_of_that_ratio(tiny_model, tmp_path):
    run(tiny_model, tmp_path / "long")
    recipe = RetrofitConfig(**{**vars(RECIPE), "stop_cr": 2.0})
    for _ in range(2):  # the second finds nothing left to do
        model = run(tiny_model, tmp_path / "short", recipe)
        member = load_model(tmp_path / "long" / "cr2").state_dict()
        assert all(torch.equal(weight, member[name]) for name, weight in model.state_dict().items())


def test_a_run_in_parts_has_the_weights_and_the_log_of_one_in_one_piece(tiny_model, tmp_path):
    whole = run(tiny_model, tmp_path / "whole").state_dict()
    for _ in range(2):  # the second finds nothing left to do
        run(tiny_model, tmp_path / "parts", until=2.0)
        assert is_checkpoint(tmp_path / "parts" / "cr2") and not is_checkpoint(tmp_path / "parts" / "cr3")
        assert not (tmp_path / "parts" / "retrofit.json").exists()
    parts = run(tiny_model, tmp_path / "parts").state_dict()
    assert all(torch.equal(weight, parts[name]) for name, weight in whole.items())
    logs = [read_json(tmp_path / of / "retrofit.json")["log"] for of in ("whole", "parts")]
    steps = [{entry["step"]: entry["kd"] for entry in log if "kd" in entry} for log in logs]
    assert steps[0] == steps[1]
    with pytest.raises(ValueError, match=r"CR 7: no checkpoint is kept there, only at \[2.0, 3.0\]"):
        run(tiny_model, tmp_path / "other", until=7)


def test_loss_parts_and_targets_are_logged(tiny_model, tmp_path):
    run(tiny_model, tmp_path)
    log = [entry for entry in json.loads((tmp_path / "retrofit.json").read_text())["log"] if "loss" in entry]
    targets = [RECIPE.schedule.cr(entry["step"] - 1) for entry in log]
    assert [entry["cr_target"] for entry in log] == pytest.approx(targets)
    assert len(log) > 1
    for entry in log:
        assert {"kd", "aux", "evicted", "cr_measured"} <= set(entry)
        assert entry["cr_measured"] == pytest.approx(1 / (1 - entry["evicted"]))


def test_accumulation_does_not_change_a_step(tiny_model, tmp_path):
    """Noise, both losses and hence weights, with rows of different lengths: losses in one batch of four, or in four."""
    logs, weights = [], []
    for size in (4, 2, 1):
        recipe = RetrofitConfig(final_cr=2.0, steps_per_unit=2, batch=4, device_batch=size, lr=1e-2, optimizer="adamw")
        model = retrofit(
            tiny_model(gates=False),
            make_tokenizer(),
            documents(8),
            DMS,
            recipe,
            tmp_path / str(size),
            train_sampling_strategy="sequential",
            **OPTIONS,
        )
        entries = json.loads((tmp_path / str(size) / "retrofit.json").read_text())["log"]
        logs.append([[e[k] for k in ("loss", "kd", "aux", "evicted")] for e in entries if "loss" in e])
        weights.append(model.state_dict())
    assert len(logs[0]) == 2 and logs[0][1][0] > 1e-3
    for log, state in zip(logs[1:], weights[1:], strict=True):
        assert log == [pytest.approx(step, rel=1e-4, abs=1e-6) for step in logs[0]]
        for name, weight in weights[0].items():
            torch.testing.assert_close(state[name], weight, rtol=1e-3, atol=1e-4)


def test_steps_end_with_the_checkpoint_of_stop_cr():
    recipe = RetrofitConfig(final_cr=8.0, rests=((4.0, 20), (8.0, 50)))
    assert recipe.steps == 770
    assert RetrofitConfig(**{**asdict(recipe), "stop_cr": 4.0}).steps == 320


@pytest.mark.parametrize(
    "wrong, message",
    [
        ({"final_cr": 0.5}, "compression ratio 0.5: must be >= 1"),
        ({"final_cr": 1.0}, "steps 0: must be >= 1"),
        ({"train": "bias"}, "train 'bias': must be one of"),
        ({"direction": "sideways"}, "direction 'sideways': must be one of"),
        ({"steps_per_unit": 0}, "steps_per_unit 0: must be >= 1"),
        ({"batch": 0}, "batch 0: must be >= 1"),
        ({"chunk": 0}, "chunk 0: must be >= 1"),
        ({"save_steps": 0}, "save_steps 0: must be >= 1"),
        ({"lr": -1.0}, "lr -1.0: must be >= 0"),
        ({"gate_lr": -1.0}, "gate_lr -1.0: must be >= 0"),
        ({"gate_lr": float("nan")}, "gate_lr nan: must be a finite number >= 0"),
        ({"warmup": -1}, "warmup -1, rests"),
        ({"optimizer": "sgd"}, "optimizer 'sgd': must be one of"),
        ({"stop_cr": 2.5}, r"stop_cr 2.5: must be one of \[2.0, 3.0"),
    ],
)
def test_bad_settings_are_named(wrong, message):
    with pytest.raises(ValueError, match=message):
        RetrofitConfig(**wrong)


@pytest.mark.parametrize("gate_lr, used", [(None, 1e-2), (0.0, 0.0), (3e-3, 3e-3)])
@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_gate_lr_applies_to_gates_only_and_may_be_zero(tiny_model, optimizer, gate_lr, used):
    model = tiny_model()
    made = make_optimizer(list(model.named_parameters()), optimizer, 1e-2, weight_decay=0.1, gate_lr=gate_lr)
    gates = {id(p) for p in model.dms.gate_parameters()}
    for group in made.param_groups:
        of_gates = [id(p) in gates for p in group["params"]]
        assert all(of_gates) or not any(of_gates)
        assert (group["lr"], group["weight_decay"]) == ((used, 0.0) if of_gates[0] else (1e-2, 0.1))
    before = [p.detach().clone() for p in model.dms.gate_parameters()]
    model.train()(torch.arange(1, 15)[None]).logits.square().mean().backward()
    made.step()
    moved = [not torch.equal(p, old) for p, old in zip(model.dms.gate_parameters(), before, strict=True)]
    assert any(moved) == (used > 0)


def test_training_gates_alone_rejects_the_neuron_gate(tiny_model, tmp_path):
    model = tiny_model(gates=False)
    recipe = RetrofitConfig(train="gates")
    with pytest.raises(ValueError, match="gate 'neuron': that gate is part of the weights"):
        retrofit(model, make_tokenizer(), documents(), DMSConfig(gate="neuron"), recipe, tmp_path)
    assert not hasattr(model, "dms")


@pytest.mark.parametrize("warmup", [0, 2])
@pytest.mark.parametrize(
    "put, dms",
    [(attach, DMSConfig(gate="neuron", window=2, offset=1.0)), (attach_dmc, DMCConfig(scale=9.0, offset=1.0))],
)
def test_neuron_zero_begins_the_ramp_with_gates_that_evict_nothing(tiny_model, tmp_path, monkeypatch, put, dms, warmup):
    seen = []

    class Watched(module.RetrofitTrainer):
        def compute_loss(self, *args, **kwargs):
            loss = super().compute_loss(*args, **kwargs)
            handle = self.model.student.dms
            rows = [p.detach()[index].abs().max() for p, index in handle.gate_rows()]
            seen.append((float(max(rows)), float(max(z.detach().max() for z in handle.step.logits.values()))))
            return loss

    monkeypatch.setattr(module, "RetrofitTrainer", Watched)
    settings = {"final_cr": 2.0, "steps_per_unit": 3, "rests": (), "gate_lr": 1e-2, "neuron_warmup": warmup}
    recipe = RetrofitConfig(**{**vars(RECIPE), **settings, "neuron_zero": True, "warmup": 0})
    run(tiny_model, tmp_path, recipe, dms, attach=put)
    rows, logits = zip(*seen, strict=True)
    assert [value == 0 for value in rows] == [step == warmup for step in range(warmup + 3)]
    assert logits[warmup] == -dms.offset and logits[-1] > -dms.offset  # and the gate learns from there


def test_neuron_settings_that_do_not_fit_are_refused(tiny_model, tmp_path):
    recipe = RetrofitConfig(**{**vars(RECIPE), "neuron_zero": True})
    with pytest.raises(ValueError, match="neuron_zero True with gate 'adapter': must be False"):
        run(tiny_model, tmp_path, recipe)
    for own in ({"gate_lr": 1e-3}, {"neuron_zero": True}):
        recipe = RetrofitConfig(**{**vars(RECIPE), **own})
        with pytest.raises(ValueError, match="fsdp True with gate 'neuron': must be without gate_lr and neuron_zero"):
            run(tiny_model, tmp_path, recipe, DMSConfig(gate="neuron"), fsdp=True)
    with pytest.raises(ValueError, match="fsdp True with optimizer 'muon': must be 'adamw'"):
        run(tiny_model, tmp_path, RetrofitConfig(**{**vars(RECIPE), "optimizer": "muon"}), fsdp=True)
    assert not any(tmp_path.iterdir())


def test_collation_pads_on_the_right_and_masks_the_padding():
    batch = pad_collate(7)([{"input_ids": [1, 2, 3], "labels": [-100, 2, 3]}, {"input_ids": [4], "labels": [4]}])
    assert batch["input_ids"].tolist() == [[1, 2, 3], [4, 7, 7]]
    assert batch["labels"].tolist() == [[-100, 2, 3], [4, -100, -100]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]
    packed = {"input_ids": [1, 2, 3], "labels": [1, 2, 3], "position_ids": [0, 0, 1]}
    for rows in ([packed, {"input_ids": [4, 5], "labels": [4, 5]}], [{"input_ids": [4, 5], "labels": [4, 5]}, packed]):
        places = pad_collate(7)(rows)["position_ids"].tolist()
        assert sorted(places) == [[0, 0, 1], [0, 1, 0]]


def test_weights_that_train_must_be_in_float32(tiny_model, tmp_path):
    with pytest.raises(ValueError, match=r"a model in torch\.bfloat16: all weights train in float32 alone"):
        retrofit(tiny_model(gates=False).bfloat16(), make_tokenizer(), documents(), DMS, RECIPE, tmp_path, **OPTIONS)
    assert not any(tmp_path.iterdir())


def test_a_directory_belongs_to_one_model_and_its_documents(tiny_model, tmp_path):
    run(tiny_model, tmp_path)
    before = (tmp_path / "cr3" / "model.safetensors").read_bytes()
    with pytest.raises(ValueError, match="holds a run with other weights: give this one another directory"):
        retrofit(tiny_model(gates=False, seed=5), make_tokenizer(), documents(), DMS, RECIPE, tmp_path, **OPTIONS)
    with pytest.raises(ValueError, match="holds a run with other documents"):
        retrofit(tiny_model(gates=False), make_tokenizer(), documents(6), DMS, RECIPE, tmp_path, **OPTIONS)
    assert (tmp_path / "cr3" / "model.safetensors").read_bytes() == before


def test_a_run_whose_loss_is_not_finite_saves_nothing_of_it(tiny_model, tmp_path, monkeypatch):
    class Spoilt(module.RetrofitTrainer):
        def compute_loss(self, model, *args, **kwargs):
            if self.state.global_step == 4:
                model.student.lm_head.weight.data.fill_(float("nan"))
            return super().compute_loss(model, *args, **kwargs)

    monkeypatch.setattr(module, "RetrofitTrainer", Spoilt)
    with pytest.raises(
        ValueError, match=r"step 5: kd is not finite; nothing of it was saved, .* holds what came before"
    ):
        run(tiny_model, tmp_path)  # the step of CR 2
    assert [d.name for d in (tmp_path / "trainer").glob("checkpoint-*")] == ["checkpoint-3"]
    assert not is_checkpoint(tmp_path / "cr2")
    monkeypatch.undo()
    run(tiny_model, tmp_path)
    assert is_checkpoint(tmp_path / "cr3")


def test_until_behind_what_is_trained_is_refused(tiny_model, tmp_path):
    run(tiny_model, tmp_path)
    with pytest.raises(ValueError, match=r"until step 5: .*checkpoint-8 is past it; load the checkpoint of that CR"):
        run(tiny_model, tmp_path, until=2.0)


@pytest.mark.parametrize("family", ["qwen3_next", "gpt_oss", "llama4_text"])
def test_model_with_other_layers_retrofits_and_comes_back(family, tmp_path):
    """States, sinks, chunks: all weights learn, the checkpoint decodes as it was trained."""
    recipe = RetrofitConfig(final_cr=2.0, steps_per_unit=2, batch=2, optimizer="adamw", lr=1e-3, warmup=1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # layers without gates
        trained = retrofit(families.tiny_model(family), make_tokenizer(), documents(), DMS, recipe, tmp_path, **OPTIONS)
        loaded = load_model(checkpoint_dir(tmp_path, 2.0))
    ids = torch.tensor([documents()[0]["input_ids"] * 2])
    with torch.no_grad():
        whole = loaded(ids, use_cache=False).logits
        torch.testing.assert_close(whole, trained(ids, use_cache=False).logits)
        cache = DMSCache.for_model(loaded, page=4)
        steps = [loaded(part, past_key_values=cache).logits for part in ids.split([7, *[1] * (ids.shape[1] - 7)], 1)]
    torch.testing.assert_close(torch.cat(steps, 1), whole, rtol=1e-3, atol=1e-3)
    log = [entry for entry in read_json(tmp_path / "retrofit.json")["log"] if "kd" in entry]
    assert all(math.isfinite(entry["kd"]) for entry in log) and log
