import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dms_core.config import DMSConfig, target_fraction
from dms_core.gate import (
    AdapterGate,
    gate_logits,
    hard_decisions,
    neuron_rows,
    read_neuron,
    soft_decisions,
    warmup_factor,
)
from dms_core.noise import sample_noise


def test_noise_is_logistic():
    noise = sample_noise(torch.zeros(400_000), torch.Generator().manual_seed(0))
    assert abs(noise.mean()) < 0.01
    assert abs(noise.var() - math.pi**2 / 3) < 0.03
    for x in (-2.0, 0.0, 1.5):
        assert abs((noise < x).float().mean() - 1 / (1 + math.exp(-x))) < 0.003


def test_noise_is_the_difference_of_two_gumbel_draws():
    g = torch.Generator().manual_seed(1)
    gumbel = [-torch.log(-torch.log(torch.rand(400_000, generator=g))) for _ in range(2)]
    noise = sample_noise(torch.zeros(400_000), g)
    levels = torch.linspace(0.01, 0.99, 9)
    torch.testing.assert_close(noise.quantile(levels), (gumbel[0] - gumbel[1]).quantile(levels), atol=0.05, rtol=0.02)


@given(st.floats(-30, 30), st.sampled_from([0.1, 1.0]))
def test_beta_is_log_of_one_minus_alpha(z, temperature):
    z = torch.tensor([z], dtype=torch.float64)
    log_keep, _ = soft_decisions(z, torch.zeros(1, dtype=torch.float64), temperature)
    exact = -torch.log1p(torch.exp(z / temperature))
    torch.testing.assert_close(log_keep, torch.where(z / temperature > 500, -z / temperature, exact))
    assert torch.isfinite(log_keep).all()


def test_hard_decision_has_value_of_step_and_gradient_of_alpha():
    z = torch.linspace(-1, 1, 41).requires_grad_()
    noise = sample_noise(z, torch.Generator().manual_seed(0))
    _, evicted = soft_decisions(z, noise, 0.5)
    torch.testing.assert_close(evicted.detach(), (z + noise > 0).float())
    weight = torch.randn(41, generator=torch.Generator().manual_seed(1))
    (evicted * weight).sum().backward()
    alpha = torch.sigmoid((z.detach() + noise) / 0.5)
    torch.testing.assert_close(z.grad, weight * alpha * (1 - alpha) / 0.5)


def test_sampled_decision_has_probability_sigmoid_z():
    z = torch.full((200_000,), 0.7)
    _, evicted = soft_decisions(z, sample_noise(z, torch.Generator().manual_seed(0)), 0.1)
    assert abs(evicted.mean() - torch.sigmoid(z[0])) < 0.005


def test_inference_evicts_iff_the_logit_is_positive():
    z = torch.tensor([[[-1.0, -0.0, 0.0, 1e-9, 5.0]]])
    assert hard_decisions(z).tolist() == [[[False, False, False, True, True]]]


def test_logits_are_scaled_and_shifted_in_fp32():
    x = torch.tensor([[[0.5, -0.25]]], dtype=torch.bfloat16)
    z = gate_logits(x, DMSConfig(scale=100.0, offset=5.0))
    assert z.dtype == torch.float32 and z.tolist() == [[[45.0, -30.0]]]


def test_granularity_layer_follows_the_first_head():
    x = torch.randn(2, 3, 5)
    z = gate_logits(x, DMSConfig(granularity="layer"))
    assert torch.equal(z, gate_logits(x, DMSConfig())[:, :1].expand(2, 3, 5))


def test_adapter_starts_at_zero_with_its_own_norm():
    gate = AdapterGate(8, 3)
    assert (gate(torch.randn(2, 5, 8)) == 0).all() and gate(torch.randn(2, 5, 8)).shape == (2, 3, 5)
    assert (gate.norm.weight == 1).all()
    assert {name for name, _ in gate.named_parameters()} == {"norm.weight", "proj.weight"}
    torch.nn.init.normal_(gate.proj.weight)
    hidden = torch.randn(1, 4, 8)
    normed = hidden / hidden.square().mean(-1, keepdim=True).add(1e-6).sqrt()
    torch.testing.assert_close(gate(hidden), (normed @ gate.proj.weight.T).transpose(1, 2))


@pytest.mark.parametrize("granularity", ["head", "layer"])
def test_logits_of_one_token_without_gradient_are_those_with(granularity):
    gate, config = AdapterGate(8, 3, eps=0.5), DMSConfig(scale=7.0, offset=2.0, granularity=granularity)
    for parameter in gate.parameters():
        torch.nn.init.normal_(parameter)
    hidden = torch.randn(2, 1, 8)
    z = gate.logits(hidden, config)
    assert z.requires_grad and z.shape == (2, 3, 1)
    normed = hidden / hidden.square().mean(-1, keepdim=True).add(0.5).sqrt() * gate.norm.weight
    expected = gate_logits((normed @ gate.proj.weight.T).transpose(1, 2), config)
    torch.testing.assert_close(z, expected)
    with torch.no_grad():
        torch.testing.assert_close(gate.logits(hidden, config), expected)


def test_rows_of_a_neuron_are_the_same_in_every_head():
    rows = neuron_rows(torch.nn.Linear(2, 12), heads=3, neuron=1)
    assert [(len(parameter), index.tolist()) for parameter, index in rows] == [(12, [1, 5, 9])] * 2
    assert all(index.dtype == torch.long for _, index in rows)


@torch.no_grad()
def test_adapter_is_fp32_under_autocast_and_after_model_cast():
    gate = AdapterGate(64, 3)
    torch.nn.init.normal_(gate.proj.weight)
    hidden = torch.randn(2, 5, 64)
    x = gate(hidden)
    with torch.autocast("cpu", torch.bfloat16):
        autocast = gate(hidden)
    assert autocast.dtype == torch.float32 and torch.equal(autocast, x)
    model = torch.nn.Sequential(gate, torch.nn.Linear(5, 5)).to(torch.bfloat16)
    assert model[1].weight.dtype == torch.bfloat16 and {p.dtype for p in gate.parameters()} == {torch.float32}
    assert torch.equal(gate(hidden), x) and torch.equal(gate(hidden.bfloat16()), gate(hidden.bfloat16().float()))


def test_adapter_moves_with_the_model_and_keeps_fp32():
    gate = torch.nn.Sequential(AdapterGate(8, 3)).to("meta", torch.bfloat16)
    assert {(p.device.type, p.dtype) for p in gate.parameters()} == {("meta", torch.float32)}
    assert {p.device.type for p in gate.to_empty(device="cpu").parameters()} == {"cpu"}


@given(heads=st.integers(1, 3), group=st.integers(1, 3), neuron=st.integers(-4, 3), factor=st.sampled_from([0.0, 0.25]))
def test_neuron_is_read_from_each_groups_first_head_and_scaled_there_alone(heads, group, neuron, factor):
    q = torch.randn(2, 5, heads * group, 4, generator=torch.Generator().manual_seed(heads))
    x, left = read_neuron(q, heads, neuron, factor)
    expected = q.clone()
    for h in range(heads):
        assert torch.equal(x[:, h], q[:, :, h * group, neuron])
        expected[:, :, h * group, neuron] *= factor
    torch.testing.assert_close(left, expected)


def test_warm_up_falls_linearly_to_zero_and_stays():
    assert [warmup_factor(t, 4) for t in (0, 1, 2, 4, 9)] == [1.0, 0.75, 0.5, 0.0, 0.0]
    assert warmup_factor(1000) == 0.5 and warmup_factor(1, 1) == 0.0
    with pytest.raises(ValueError, match="warm-up steps 0"):
        warmup_factor(0, 0)


@pytest.mark.parametrize(
    "wrong, message",
    [
        ({"window": -1}, "window -1: must be >= 0"),
        ({"window": 2.5}, "window 2.5"),
        ({"gate": "lstm"}, "gate 'lstm': must be one of .*adapter"),
        ({"granularity": "token"}, "granularity 'token'"),
        ({"window": None}, "window None: must be an integer >= 0"),
        ({"eviction": "never"}, "eviction 'never'"),
        ({"scale": 0.0}, "scale 0.0: must be > 0"),
        ({"temperature": float("nan")}, "temperature nan: must be a finite number > 0"),
    ],
)
def test_invalid_settings_raise(wrong, message):
    with pytest.raises(ValueError, match=message):
        DMSConfig(**wrong)


def test_settings_round_trip_through_dict_and_unknown_ones_raise():
    config = DMSConfig(gate="neuron", window=7, eviction="immediate")
    assert DMSConfig.from_dict(config.to_dict()) == config and config.lag == 7
    with pytest.raises(ValueError, match=r"\['sparsity'\]: allowed are .*window"):
        DMSConfig.from_dict({"sparsity": 3})


def test_target_fraction_is_one_minus_one_over_cr():
    assert [target_fraction(cr) for cr in (1, 2, 4, 8)] == [0, 0.5, 0.75, 0.875]
    for cr in (0.5, 0, -1, float("nan")):
        with pytest.raises(ValueError, match=f"compression ratio {cr}: must be >= 1"):
            target_fraction(cr)
