"""A threshold on predicted attention: targets against transformers' own attention, and decisions through the cache."""

import pytest
import torch

from dms_core.baselines.kvzap import attach_scores, observe
from dms_core.cache.dms import DMSCache
from dms_core.model import attach, detach
from dms_core.visibility import visible

WINDOW = 3


def documents(*lengths: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(2, 40, (n,), generator=generator).tolist() for n in lengths]


@torch.no_grad()
def by_loops(model, ids: list[int], window: int) -> list[tuple[torch.Tensor, list[list[float]]]]:
    """Normed residual streams (T, d), and per token and KV head the largest weight from beyond the window."""
    model.set_attn_implementation("eager")
    out = model(torch.tensor([ids]), output_attentions=True, output_hidden_states=True, use_cache=False)
    found = []
    for hidden, weights in zip(out.hidden_states, out.attentions, strict=False):
        x, group = hidden[0], weights.shape[1] // 2
        x = x / (x.square().mean(-1, keepdim=True) + model.config.rms_norm_eps).sqrt()
        future = [
            [
                max([0.0] + [float(weights[0, h * group + g, i, j]) for g in range(group) for i in queries])
                for h in range(2)
            ]
            for j in range(len(ids))
            for queries in [range(j + window + 1, len(ids))]
        ]
        found.append((x, future))
    return found


@pytest.mark.parametrize("window", [0, 3])
def test_targets_are_the_most_attention_from_beyond_the_window(tiny_model, window):
    ids = documents(300)[0][:17] if window else documents(17)[0]
    expected = by_loops(tiny_model(gates=False), ids, window)
    for (x, future), (wanted_x, wanted) in zip(observe(tiny_model(), ids, window), expected, strict=True):
        torch.testing.assert_close(x, wanted_x)
        torch.testing.assert_close(future, torch.tensor(wanted))


def test_gates_are_the_ridge_regressions_of_the_log_targets(tiny_model):
    texts, ridge = documents(40, 25, 2), 0.02
    fitted = attach_scores(tiny_model(gates=False), texts, WINDOW, 4.0, ridge)
    layers = zip(*(by_loops(tiny_model(gates=False), ids, WINDOW) for ids in texts), strict=True)
    for at, layer in zip(fitted.dms.layout.full, layers, strict=True):
        pairs = [(x[j], y[j]) for x, y in layer for j in range(len(y) - WINDOW - 1)]  # tokens that have a future
        x = torch.stack([x for x, _ in pairs]).double()
        y = torch.tensor([y for _, y in pairs], dtype=torch.float64).log()
        w, b = (-p.detach().double() for p in (at.module.dms_gate.proj.weight, at.module.dms_gate.bias))
        rest = y - x @ w.T - b
        assert rest.sum(0).abs().max() < 1e-3  # both are where the loss has no slope
        assert ((x - x.mean(0)).T @ rest - ridge * len(x) * w.T).abs().max() < 1e-2
        assert rest.var() < y.var()


@pytest.mark.parametrize("cr", [1.0, 2.0, 4.0])
@torch.no_grad()
def test_the_ratio_is_met_on_the_documents_by_one_threshold(tiny_model, cr):
    texts = documents(40, 25, 31)
    model = attach_scores(tiny_model(gates=False), texts, WINDOW, cr)
    evicted = tokens = 0
    for ids in texts:
        model(torch.tensor([ids]), use_cache=False)
        marks = torch.cat(list(model.dms.step.evicted.values()), 1)
        evicted, tokens = evicted + int(marks.sum()), tokens + marks.numel()
        scores = -torch.cat(list(model.dms.step.logits.values()), 1)[~marks]
        assert scores.min() >= 0  # prediction minus threshold of all that stay
    assert abs(evicted - int(tokens * (1 - 1 / cr))) <= 2  # sums may round otherwise in a document than in all


@torch.no_grad()
def test_a_token_decides_about_itself_in_the_cache_as_in_a_full_pass(tiny_model):
    texts = documents(40, 25)
    model = attach_scores(tiny_model(gates=False), texts, WINDOW, 2.0)
    ids = torch.tensor([documents(33)[0], documents(1, 33)[1]])
    full = model(ids, use_cache=False).logits
    marks = torch.stack([z > 0 for z in model.dms.step.logits.values()])  # (layers, B, H, T)
    assert all(torch.equal(a, b) for a, b in zip(marks, model.dms.step.evicted.values(), strict=True))
    cache = DMSCache.for_model(model, page=4)
    parts = [model(ids[:, :9], past_key_values=cache).logits]
    for t in range(9, 33):
        parts.append(model(ids[:, t : t + 1], past_key_values=cache).logits)
        held = torch.stack([visible(layer[..., : t + 1], WINDOW)[:, :, -1].sum(-1) for layer in marks])
        assert torch.equal(cache.live_tokens(), held)
    torch.testing.assert_close(torch.cat(parts, 1), full, rtol=1e-4, atol=1e-4)
    assert cache.live_tokens().float().mean() < 28


def test_settings_say_the_method_and_wrong_uses_leave_the_model_alone(tiny_model):
    model = tiny_model(gates=False)
    with pytest.raises(ValueError, match="documents of at most 4 tokens"):
        attach_scores(model, documents(4, 2), WINDOW, 2.0)
    with pytest.raises(ValueError, match=r"compression ratio 0\.5"):
        attach_scores(model, documents(9), WINDOW, 0.5)
    assert not hasattr(model, "dms")
    attach_scores(model, documents(9), WINDOW, 2.0)
    assert model.dms.config.to_dict()["method"] == "kvzap" and model.dms.config.lag == 0
    with pytest.raises(ValueError, match="already has DMS gates"):
        attach(model, model.dms.config)
    detach(model)
    assert not any("dms_gate" in name for name, _ in model.named_parameters())
