"""A prefix prefilled once serves many prompts, and many turns."""

import pytest
import torch
from model_inputs import every_kind, random_ids

from companion import families
from dms_core.cache.dms import DMSCache
from dms_core.config import DMSConfig
from dms_core.model import attach


def logits_after(model, cache, turns) -> torch.Tensor:
    """Last logits of turns of several lengths, padded on the left, after what the cache holds."""
    width, held = max(map(len, turns)), cache.tokens_seen()[0].item()
    ids = torch.tensor([[0] * (width - len(turn)) + turn for turn in turns])
    mask = torch.tensor([[0] * (width - len(turn)) + [1] * len(turn) for turn in turns])
    past = torch.ones(len(turns), held, dtype=torch.long)
    positions = held + (mask.cumsum(1) - 1).clamp_min(0)
    return model(ids, attention_mask=torch.cat([past, mask], 1), position_ids=positions, past_key_values=cache).logits


@every_kind
@torch.no_grad()
def test_prompts_after_a_copied_prefix_equal_whole_prompts(tiny_model, kind):
    model, prefix = tiny_model(kind), random_ids(1, 19, 5)
    turns = [random_ids(1, n, n)[0].tolist() for n in (3, 8, 1)]
    cache = DMSCache.for_model(model, page=4)
    model(prefix, past_key_values=cache)
    cache.fork(3)
    said = logits_after(model, cache, turns)[:, -1]
    for row, turn in enumerate(turns):
        whole = torch.cat([prefix, torch.tensor([turn])], 1)
        torch.testing.assert_close(said[row], model(whole, use_cache=False).logits[0, -1], rtol=1e-4, atol=1e-4)


@every_kind
@torch.no_grad()
def test_state_after_a_prefix_depends_on_it_alone_but_for_one_pending_decision(tiny_model, kind):
    """What the prefix's last token is worth its successor says; everything before is decided."""
    model, prefix = tiny_model(kind, window=3), random_ids(1, 19, 5)
    decisions = []
    for seed in range(6):
        ids = torch.cat([prefix, random_ids(1, 6, seed)], 1)
        model(ids, use_cache=False)
        decisions.append(torch.stack([model.dms.step.evicted[layer][0, :, :19] for layer in range(2)]))
    decisions = torch.stack(decisions)  # (continuations, layers, H, 19)
    assert (decisions[..., :18] == decisions[:1, ..., :18]).all()
    assert (decisions[..., 18] != decisions[:1, ..., 18]).any()


@pytest.mark.filterwarnings("ignore:.*keep their")
@pytest.mark.parametrize("family", ["qwen3_next", "falcon_h1", "llama4_text", "gemma3_text"])
@torch.no_grad()
def test_chains_of_a_prefix_go_their_own_ways_in_a_hybrid(family):
    """States are copied; no chain writes into the pages of another, where chunks begin anew neither."""
    model = attach(families.tiny_model(family), DMSConfig(window=3, scale=10.0, offset=0.0))
    for parameter in model.dms.gate_parameters():
        torch.nn.init.normal_(parameter)
    prefix, turns = random_ids(1, 22, 5), random_ids(3, 16, 7)
    cache = DMSCache.for_model(model, page=1)
    model(prefix, past_key_values=cache)
    cache.fork(3)
    said = torch.cat([model(part, past_key_values=cache).logits for part in turns.split([4, *[1] * 12], 1)], 1)
    whole = torch.cat([prefix.expand(3, -1), turns], 1)
    torch.testing.assert_close(said, model(whole, use_cache=False).logits[:, 22:], rtol=1e-3, atol=1e-3)
    cache = DMSCache.for_model(model, page=1)
    model(prefix, past_key_values=cache)
    cache.fork(3)
    said = torch.cat([model(part, past_key_values=cache).logits for part in turns.split(1, 1)], 1)
    torch.testing.assert_close(said, model(whole, use_cache=False).logits[:, 22:], rtol=1e-3, atol=1e-3)
    with pytest.raises(ValueError, match="chains 0: must be >= 1"):
        cache.fork(0)


@pytest.mark.filterwarnings("ignore:.*keep their")
@pytest.mark.parametrize("family", ["falcon_h1", "llama4_text", "qwen3_next"])
def test_layers_that_cannot_take_back_tokens_refuse_slack(family):
    model = attach(families.tiny_model(family), DMSConfig(window=3))
    with pytest.raises(ValueError, match=r"slack 4: must be 0, layers \[0.*\] have chunks or states"):
        DMSCache.for_model(model, slack=4)
    cache = DMSCache.for_model(model)
    model(random_ids(1, 9), past_key_values=cache)
    with pytest.raises(ValueError, match="was made with slack 0"):
        cache.crop(-1)


@pytest.mark.filterwarnings("ignore:.*keep their")
@torch.no_grad()
def test_sliding_layers_take_back_tokens():
    """Prompt look-up on a model with sliding windows and full attention says the same text."""
    model = attach(families.tiny_model("gemma3_text"), DMSConfig(window=3, scale=10.0, offset=0.0))
    for parameter in model.dms.gate_parameters():
        torch.nn.init.normal_(parameter)
    ids = random_ids(1, 4, 3).repeat(1, 4)
    ends = {"max_new_tokens": 16, "do_sample": False, "eos_token_id": None}
    cache = DMSCache.for_model(model, slack=3)
    guessed = model.generate(ids, **ends, past_key_values=cache, prompt_lookup_num_tokens=3)
    assert torch.equal(guessed, model.generate(ids, **ends))
