"""Muon on a CPU against torch's own; rows of the neuron gate against a slow transcription."""

import copy

import pytest
import torch

from dms_core.baselines.dmc import DMCConfig, attach_dmc
from dms_core.config import DMSConfig
from dms_core.model import attach
from dms_core.train.optim import Muon, make_optimizer

SHAPES = ((8, 12), (12, 8), (8, 8))
SETTINGS = {"lr": 0.05, "weight_decay": 0.1, "adjust_lr_fn": "match_rms_adamw"}


def steps(kind, count: int = 4, state: dict | None = None):
    """(weights after some steps on fixed gradients, optimiser); the last matrix never has a gradient."""
    g = torch.Generator().manual_seed(0)
    weights = [torch.nn.Parameter(torch.randn(shape, generator=g)) for shape in (*SHAPES, (3, 3))]
    optimizer = kind(weights, **SETTINGS)
    if state is not None:
        optimizer.load_state_dict(state)
    for _ in range(count):
        for weight in weights[:-1]:
            weight.grad = torch.randn(weight.shape, generator=g)
        optimizer.step()
    return weights, optimizer


def test_steps_equal_torchs_own_in_fp32(monkeypatch):
    ours, _ = steps(Muon)
    in_bf16, _ = steps(torch.optim.Muon)
    with monkeypatch.context() as patch:
        patch.setattr(torch.Tensor, "bfloat16", torch.Tensor.clone)  # torch's function, without its cast
        in_fp32, _ = steps(torch.optim.Muon)
    for mine, exact, rounded in zip(ours, in_fp32, in_bf16, strict=True):
        assert torch.equal(mine, exact)
        torch.testing.assert_close(mine, rounded, atol=0.02, rtol=0.0)


@pytest.mark.parametrize("wrote, reads", [(torch.optim.Muon, Muon), (Muon, torch.optim.Muon)])
def test_state_of_either_loads_into_the_other(wrote, reads):
    _, before = steps(wrote)
    _, after = steps(reads, 0, copy.deepcopy(before.state_dict()))
    assert after.param_groups[0].keys() == before.param_groups[0].keys()
    for old, new in zip(before.state.values(), after.state.values(), strict=True):
        assert torch.equal(new["momentum_buffer"], old["momentum_buffer"]) and new["momentum_buffer"].abs().max() > 0


def trained(model, kind: str, steps: int = 3, own=None, **settings):
    """Weights after some steps on fixed gradients; own: ``gate_rows`` of the model, stepped beside by a plain AdamW."""
    made = make_optimizer(list(model.named_parameters()), kind, 1e-2, weight_decay=0.1, **settings)
    leaves = [torch.nn.Parameter(p.detach()[index].clone()) for p, index in own or ()]
    beside = torch.optim.AdamW(leaves, lr=3e-3, betas=(0.9, 0.95), weight_decay=0.0) if leaves else None
    g = torch.Generator().manual_seed(0)
    for _ in range(steps):
        for p in model.parameters():
            p.grad = torch.randn(p.shape, generator=g)
        for leaf, (p, index) in zip(leaves, own or (), strict=True):
            leaf.grad = p.grad[index].clone()
            p.grad[index] = 0
        made.step()
        if beside:
            beside.step()
    with torch.no_grad():
        for leaf, (p, index) in zip(leaves, own or (), strict=True):
            p[index] = leaf
    return model.state_dict()


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
@pytest.mark.parametrize("kind, method", [("llama", "dms"), ("qwen2", "dms"), ("qwen3", "dms"), ("qwen2", "dmc")])
def test_neuron_rows_step_at_gate_lr_without_decay_and_other_rows_as_if_theirs_had_no_gradient(
    tiny_model, optimizer, kind, method
):
    def make():
        model = tiny_model(kind, gates=False)
        return attach(model, DMSConfig(gate="neuron")) if method == "dms" else attach_dmc(model, DMCConfig())

    first, second = make(), make()
    rows = first.dms.gate_rows()
    ours = trained(first, optimizer, gate_lr=3e-3, rows=rows)
    expected = trained(second, optimizer, own=second.dms.gate_rows())
    assert all(torch.equal(ours[name], weight) for name, weight in expected.items())
    projections = 2 if method == "dmc" else 1
    assert len(rows) == 2 * projections * (2 if kind == "qwen2" else 1)  # layers, projections, bias too
    plain, ignored = make(), make()  # without a rate of their own they are rows as others
    plain = trained(plain, optimizer)
    ignored = trained(ignored, optimizer, rows=ignored.dms.gate_rows())
    assert all(torch.equal(plain[name], weight) for name, weight in ignored.items())
    assert not all(torch.equal(plain[name], weight) for name, weight in ours.items())


def test_gate_rows_are_what_the_gate_reads(tiny_model):
    """Setting them to zero silences every gate's input, and changes nothing else of what the model computes."""
    model, ids = tiny_model("qwen2", gate="neuron", neuron=2, offset=5.0), torch.arange(1, 20)[None]
    kept = copy.deepcopy(model.state_dict())
    with torch.no_grad():
        model.dms.evicting = False
        before = model(ids, use_cache=False).logits
        model.dms.zero_neurons()
        assert torch.equal(model(ids, use_cache=False).logits, before)
        model.dms.evicting = True
        model(ids, use_cache=False)
    assert all((z == -5.0).all() for z in model.dms.step.logits.values())
    changed = {name: (w != kept[name]).sum().item() for name, w in model.state_dict().items()}
    assert {name for name, count in changed.items() if count} == {
        f"model.layers.{i}.self_attn.q_proj.{kind}" for i in range(2) for kind in ("weight", "bias")
    }
    assert set(changed.values()) == {0, 2, 2 * 32}  # two KV heads: a bias and a row of 32 each
