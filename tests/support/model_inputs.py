"""Inputs, and ways to run a model, that tests of attached models share."""

from itertools import pairwise

import pytest
import torch

from dms_core.cache.dms import DMSCache

KINDS = ("llama", "qwen2", "qwen3")
SETTINGS = [
    {"gate": gate, "granularity": granularity, "eviction": eviction}
    for gate in ("adapter", "neuron")
    for granularity in ("head", "layer")
    for eviction in ("delayed", "immediate")
]
every_kind = pytest.mark.parametrize("kind", KINDS)
every_setting = pytest.mark.parametrize("options", SETTINGS, ids=lambda s: "-".join(s.values()))


def random_ids(batch: int, tokens: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(1, 40, (batch, tokens), generator=torch.Generator().manual_seed(seed))


def cached_logits(model, ids, cuts, cache=None):
    cache = cache or DMSCache.for_model(model, page=2)
    edges = [0, *cuts, ids.shape[1]]
    return torch.cat([model(ids[:, a:b], past_key_values=cache).logits for a, b in pairwise(edges)], 1), cache


def greedy_reference(model, prompts: list[list[int]], new: int) -> list[list[int]]:
    """The full-sequence hard-masked forward repeated step by step, one prompt at a time."""
    out = []
    for prompt in prompts:
        ids = torch.tensor([prompt])
        for _ in range(new):
            ids = torch.cat([ids, model(ids).logits[:, -1:].argmax(-1)], 1)
        out.append(ids[0, len(prompt) :].tolist())
    return out


def left_padded(prompts: list[list[int]]) -> dict[str, torch.Tensor]:
    width = max(map(len, prompts))
    ids = torch.tensor([[0] * (width - len(p)) + p for p in prompts])
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts])
    return {"input_ids": ids, "attention_mask": mask}


PROMPTS = [random_ids(1, n, n)[0].tolist() for n in (3, 11, 7)]
