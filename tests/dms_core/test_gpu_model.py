"""The whole path on a CUDA device: the CPU's answers are the reference.  ``make gpu-check`` runs these."""

import pytest
import torch

from dms_core.cache.dms import DMSCache

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def inputs(rows: int, width: int):
    g = torch.Generator().manual_seed(0)
    ids = torch.randint(1, 40, (rows, width), generator=g)
    mask = torch.ones_like(ids)
    mask[0, : width // 3] = 0
    return ids, mask


def test_cached_generation_on_cuda_equals_cpu(tiny_model):
    model = tiny_model("llama", seed=1)
    ids, mask = inputs(3, 30)
    said, live = [], []
    for device in ("cpu", "cuda"):
        model.to(device)
        cache = DMSCache.for_model(model, page=4)
        out = model.generate(
            input_ids=ids.to(device),
            attention_mask=mask.to(device),
            past_key_values=cache,
            do_sample=False,
            max_new_tokens=60,
        )
        said.append(out.tolist())
        live.append(cache.live_tokens().tolist())
    assert said[0] == said[1] and live[0] == live[1]


def test_training_step_gradients_on_cuda_equal_cpu(tiny_model):
    ids, mask = inputs(2, 600)  # long enough for the kept list on both devices
    gradients = []
    for device in ("cpu", "cuda"):
        each = tiny_model("llama", seed=2).to(device)
        logits = each(input_ids=ids.to(device), attention_mask=mask.to(device), use_cache=False).logits
        (logits.float() * mask.to(device)[..., None]).square().mean().backward()
        gradients.append({name: p.grad.cpu() for name, p in each.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    for name, expected in gradients[0].items():
        torch.testing.assert_close(
            gradients[1][name], expected, rtol=1e-3, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}"
        )
