"""One retrofit, however its batches are cut or economical with memory; test_processes.py cuts it into processes."""

import json
import sys

import pytest
import torch
from forks import run

from companion.tasks.reasoner import make_tokenizer
from dms_core.config import DMSConfig
from dms_core.noise import keyed_noise, row_keys, sample_noise
from dms_core.train.losses import Distiller
from dms_core.train.retrofit import pad_collate


def test_noise_of_a_row_does_not_depend_on_the_batch_around_it():
    keys = row_keys(seed=1, step=5, first=0, count=6)
    whole = keyed_noise(torch.zeros(6, 2, 40), keys, layer=3)
    assert torch.equal(row_keys(1, 5, 4, 2), keys[4:])
    assert torch.equal(keyed_noise(torch.zeros(2, 2, 25), keys[4:], 3), whole[4:, :, :25])  # less padding


def test_noise_is_logistic_and_fresh_in_every_row_layer_head_token_step_and_seed():
    z = torch.zeros(32, 4, 1000)
    noise = keyed_noise(z, row_keys(0, 0, 0, 32), 0)
    reference = sample_noise(z, torch.Generator().manual_seed(0))
    quantiles = torch.linspace(0.01, 0.99, 21)
    torch.testing.assert_close(
        noise.flatten().quantile(quantiles), reference.flatten().quantile(quantiles), atol=0.06, rtol=0.03
    )
    assert noise.unique().numel() > 0.98 * noise.numel()
    others = [keyed_noise(z, row_keys(*place, 0, 32), layer) for *place, layer in ((0, 0, 1), (0, 1, 0), (1, 0, 0))]
    shifted = [noise.roll(1, dim) for dim in range(3)]
    for other in others + shifted:
        assert abs(torch.corrcoef(torch.stack([noise.flatten(), other.flatten()]))[0, 1]) < 0.015


def losses_and_gradients(model, checkpointing: bool, separate_teacher):
    if checkpointing:
        model.activation_checkpointing_enable({"use_reentrant": False})
    model.train()
    model.dms.noise_keys = row_keys(0, 0, 0, 2)
    g = torch.Generator().manual_seed(0)
    ids = [torch.randint(1, 40, (n,), generator=g).tolist() for n in (9, 15)]
    batch = pad_collate(0)([{"input_ids": x, "labels": [-100] * 3 + x[3:]} for x in ids])
    out = Distiller(model, separate_teacher)(**batch, alpha_target=0.9)
    out["loss"].backward()
    return out, {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("gate, frozen", [("adapter", False), ("adapter", True), ("neuron", False)])
@pytest.mark.parametrize("kind", ["llama", "qwen3"])
def test_activation_checkpointing_changes_neither_losses_nor_gradients(tiny_model, kind, gate, frozen):
    results = []
    for checkpointing in (False, True):
        model = tiny_model(kind, gate=gate)
        if frozen:
            gates = {id(p) for p in model.dms.gate_parameters()}
            for parameter in model.parameters():
                parameter.requires_grad_(id(parameter) in gates)
        teacher = None if frozen else tiny_model(kind, seed=1, gates=False)
        results.append(losses_and_gradients(model, checkpointing, teacher))
    (plain, gradients), (saved, again) = results
    assert plain["kd"] > 1e-4 and 0 < plain["evicted"] < 1 and set(gradients) == set(again)
    for name in ("loss", "kd", "aux", "evicted"):
        assert torch.equal(plain[name], saved[name])
    for name, gradient in gradients.items():
        torch.testing.assert_close(again[name], gradient, rtol=1e-5, atol=1e-7)


def test_checkpointed_layers_are_computed_twice(tiny_model):
    """What the test above compares is really the checkpointed path."""
    model, calls = tiny_model(), []
    model.get_decoder().layers[0].self_attn.register_forward_hook(lambda *_: calls.append(1))
    losses_and_gradients(model, True, tiny_model(seed=1, gates=False))
    assert len(calls) == 2


PEAK = """
import resource, torch
from dms_core.train.losses import chunked_loss
torch.set_num_threads(1)
hidden, teacher = (torch.randn(1024, 64) for _ in range(2))
heads = [torch.nn.Linear(64, 150_000, bias=False) for _ in range(2)]
heads[1].requires_grad_(False)
hidden.requires_grad_()
heads[0].weight.grad, hidden.grad = torch.zeros_like(heads[0].weight), torch.zeros_like(hidden)
hidden.grad.add_(1), heads[0].weight.grad.add_(1)  # pages that training holds anyway
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
chunked_loss(hidden, teacher, torch.zeros(1024, dtype=torch.long), heads, "forward", 32).backward()
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024)
"""


@pytest.mark.slow
def test_chunked_loss_never_holds_all_logits_of_a_long_sequence():
    """1024 tokens, 150,000 entries in the vocabulary, chunks of 32; the narrow hidden state only saves time."""
    at_once = {"MALLOC_MMAP_THRESHOLD_": "1000000"}  # freed memory goes back to the system and does not fragment
    peak = int(run([sys.executable, "-c", PEAK], **at_once).stdout)
    logits = 1024 * 150_000 * 4
    assert peak < logits / 2, f"{peak / 1e9:.2f} GB beyond the inputs, of {logits / 1e9:.2f} GB for one set of logits"


def test_neuron_warmup_fades_the_neuron_before_any_eviction(tmp_path, tiny_model, monkeypatch):
    """Warm-up of appendix C, then the ramp."""
    module, seen = sys.modules["dms_core.train.retrofit"], []  # the package exports the function of that name

    class Watched(module.RetrofitTrainer):
        def compute_loss(self, model, inputs, *args, **kwargs):
            loss = super().compute_loss(model, inputs, *args, **kwargs)
            dms = self.model.student.dms
            seen.append((dms.neuron_factor, dms.evicting, float(self.parts["evicted"])))
            return loss

    monkeypatch.setattr(module, "RetrofitTrainer", Watched)
    recipe = module.RetrofitConfig(final_cr=2.0, steps_per_unit=2, neuron_warmup=4, batch=2, lr=1e-3)
    data = [{"input_ids": list(range(1, 20)), "labels": list(range(1, 20))}] * 4
    settings = DMSConfig(gate="neuron", window=2, offset=0.0)
    model = module.retrofit(tiny_model(gates=False), make_tokenizer(), data, settings, recipe, tmp_path, use_cpu=True)
    assert [factor for factor, *_ in seen] == [1.0, 0.75, 0.5, 0.25, 0.0, 0.0]
    assert [evicting for _, evicting, _ in seen] == [False] * 4 + [True] * 2
    assert all((evicted > 0) == evicting for _, evicting, evicted in seen)
    assert (model.dms.neuron_factor, model.dms.evicting, model.dms.noise_keys) == (0.0, True, None)
    log = json.loads((tmp_path / "retrofit.json").read_text())["log"]
    assert log[0]["kd"] < 1e-6  # the first step is still the original model
    assert [entry["cr_target"] for entry in log if "loss" in entry] == [1, 1, 1, 1, 1, 1.5]
