"""Muon on a CPU against torch's own."""

import copy

import pytest
import torch

from dms_core.train.optim import Muon

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
