"""DMC: the parallel form, the cache and a slow transcription of the definition say the same."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from companion.experiments.heldout import held_out
from companion.paths import REASONER
from companion.tasks.mixture import TraceDataset
from companion.tasks.reasoner import load_tokenizer, make_tokenizer
from dms_core import detach, save_model
from dms_core.baselines.dmc import DMCConfig, attach_dmc, load_dmc
from dms_core.baselines.dmc_cache import DMCCache, running_average
from dms_core.cache.dms import DMSCache
from dms_core.checkpoint import load_base
from dms_core.sampling import SamplingConfig, sample_chains
from dms_core.train.losses import Distiller
from dms_core.train.recipe import RetrofitConfig
from dms_core.train.retrofit import retrofit
from dms_core.train.schedule import checkpoint_dir

CONFIG = DMCConfig(scale=8.0, offset=0.0)


@pytest.fixture
def merging(tiny_model):
    """A tiny random model whose keys' neurons merge about half of all tokens."""

    def make(kind: str = "llama", config: DMCConfig = CONFIG, seed: int = 0):
        return attach_dmc(tiny_model(kind, seed, gates=False), config)

    return make


def tokens(batch: int, length: int, seed: int = 1) -> torch.Tensor:
    return torch.randint(1, 40, (batch, length), generator=torch.Generator().manual_seed(seed))


def merge_one(entries: list, k, v, alpha: bool, weight: float, position: int) -> None:
    """The definition: into the last entry as a weighted average, or appended.  Entries are [k, v, z, position]."""
    if alpha and entries:
        k0, v0, z, _ = entries[-1]
        entries[-1] = [(k0 * z + k * weight) / (z + weight), (v0 * z + v * weight) / (z + weight), z + weight, position]
    else:
        entries.append([k, v, weight, position])


def transcribe(attention, hidden: torch.Tensor, rotary, config: DMCConfig) -> tuple[torch.Tensor, list[int]]:
    """One document (T, d) through one Llama attention layer, token by token with lists; and the entries at the end."""
    n, width = config.neuron, attention.head_dim
    q, k, v = (
        proj(hidden).unflatten(-1, (-1, width)) for proj in (attention.q_proj, attention.k_proj, attention.v_proj)
    )
    group, out = q.shape[1] // k.shape[1], torch.zeros_like(q)
    held = []
    for h in range(k.shape[1]):
        entries = []
        for t in range(len(hidden)):
            mine = slice(h * group, (h + 1) * group)
            alpha = bool(config.scale * k[t, h, n] - config.offset > 0)
            weight = float(torch.sigmoid(q[t, mine, n].mean() + config.offset)) + torch.finfo(torch.bfloat16).eps
            merge_one(entries, silenced(k[t, h], n), v[t, h], alpha, weight, t)
            keys = torch.stack([silenced(rotate(e[0], e[3], rotary), n) for e in entries])
            for head in range(mine.start, mine.stop):
                query = silenced(rotate(silenced(q[t, head], n), t, rotary), n)
                share = torch.softmax(keys @ query * width**-0.5, 0)
                out[t, head] = share @ torch.stack([e[1] for e in entries])
        held.append(len(entries))
    return attention.o_proj(out.flatten(1)), held


def silenced(x: torch.Tensor, neuron: int) -> torch.Tensor:
    x = x.clone()
    x[neuron] = 0
    return x


def rotate(x: torch.Tensor, position: int, rotary) -> torch.Tensor:
    cos, sin = rotary(x, torch.tensor([[position]]))
    return apply_rotary_pos_emb(x[None, None, None], x[None, None, None], cos, sin)[0].flatten()


@torch.no_grad()
@pytest.mark.parametrize("config", [CONFIG, DMCConfig(scale=4.0, offset=0.5, neuron=2)])
def test_parallel_form_equals_the_sequential_definition_in_every_layer(merging, config):
    model, ids, seen = merging(config=config), tokens(1, 37), {}
    for index, attention in enumerate(model.dms.layout.modules):
        attention.register_forward_hook(
            lambda module, args, kwargs, output, index=index: seen.update(
                {index: (kwargs["hidden_states"], output[0])}
            ),
            with_kwargs=True,
        )
    model(input_ids=ids, use_cache=False)
    for index, attention in enumerate(model.dms.layout.modules):
        hidden, out = seen[index]
        with model.dms.disabled():  # the transcription calls the layer's projections
            expected, held = transcribe(attention, hidden[0], model.model.rotary_emb, config)
        torch.testing.assert_close(out[0], expected, rtol=1e-4, atol=1e-5)
        assert (~model.dms.step.evicted[index][0]).sum(1).tolist() == held
        assert min(held) < 30 and max(held) > 8


@settings(max_examples=30)
@given(st.integers(1, 23), st.integers(0, 999))
def test_scan_equals_the_recurrence_for_soft_shares_and_any_carry(length, seed):
    g = torch.Generator().manual_seed(seed)
    x, carry = torch.randn(2, 3, length, 4, generator=g), torch.rand(2, 3, 5, generator=g)
    alpha, weight = (torch.rand(2, 3, length, generator=g) for _ in range(2))
    average, last = running_average(x, alpha, weight, carry)
    state = carry
    for t in range(length):
        state = alpha[:, :, t, None] * state + weight[:, :, t, None] * torch.cat([x[:, :, t], torch.ones(2, 3, 1)], -1)
        torch.testing.assert_close(average[:, :, t], state[..., :4] / state[..., 4:], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(last, state, rtol=1e-4, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("kind", ["llama", "qwen2", "qwen3"])
@pytest.mark.parametrize("parts", [[1] * 70, [21, *[1] * 49], [9, 12, *[1] * 20, 17, 1, 11]])
def test_decode_and_prefill_with_the_cache_equal_the_parallel_form(merging, kind, parts):
    model, ids = merging(kind), tokens(3, 70)
    whole = model(input_ids=ids, use_cache=False).logits
    cache, out, reads = DMSCache.for_model(model), [], 0
    for part in ids.split(parts, 1):
        out.append(model(input_ids=part, past_key_values=cache, use_cache=True).logits)
        reads = reads + cache.live_tokens() if part.shape[1] == 1 and len(out) > 1 else reads  # the first is prefill
    torch.testing.assert_close(torch.cat(out, 1), whole, rtol=1e-4, atol=1e-4)
    assert isinstance(cache, DMCCache) and cache.tokens_seen().tolist() == [70] * 3
    model(input_ids=ids, use_cache=False)
    entries = torch.stack([(~model.dms.step.evicted[i]).sum(2) for i in range(2)])
    assert torch.equal(cache.live_tokens(), entries) and torch.equal(cache.peak_tokens(), entries)
    assert torch.equal(cache.kv_reads(), reads)
    assert entries.min() < 40 and entries.max() > 25


@torch.no_grad()
def test_padding_and_packed_documents_change_nothing(merging):
    model = merging()
    a, b = tokens(1, 13, 2), tokens(1, 8, 3)
    alone = [model(input_ids=x, use_cache=False).logits[0] for x in (a, b)]
    left, right = torch.zeros(2, 1, 13, dtype=torch.long)
    left[0, 5:], right[0, :8] = b[0], b[0]
    ids, mask = torch.cat([a, left]), torch.ones(2, 13, dtype=torch.long)
    mask[1, :5] = 0
    positions = (mask.cumsum(1) - 1).clamp_min(0)
    for cache in (None, DMSCache.for_model(model)):
        out = model(input_ids=ids, attention_mask=mask, position_ids=positions, past_key_values=cache).logits
        torch.testing.assert_close(out[0], alone[0], rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(out[1, 5:], alone[1], rtol=1e-4, atol=1e-4)
    out = model(input_ids=torch.cat([a, right]), attention_mask=mask.flip(1), use_cache=False).logits
    torch.testing.assert_close(out[1, :8], alone[1], rtol=1e-4, atol=1e-4)
    where = torch.cat([torch.arange(13), torch.arange(8)])[None]
    packed = model(input_ids=torch.cat([a, b], 1), position_ids=where, use_cache=False).logits[0]
    torch.testing.assert_close(packed, torch.cat(alone), rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_dmc_without_merging_equals_the_original_model(tiny_model, merging):
    ids, plain = tokens(2, 20), tiny_model(gates=False)
    expected = plain(ids).logits
    model = merging()
    assert not torch.allclose(model(ids, use_cache=False).logits, expected, atol=1e-3)
    model.dms.neuron_factor = 1.0  # a warm-up's first step
    torch.testing.assert_close(model(ids, use_cache=False).logits, expected, rtol=1e-4, atol=1e-5)
    assert not any(e.any() for e in model.dms.step.evicted.values())
    model.dms.neuron_factor = 0.0
    with model.dms.disabled():
        torch.testing.assert_close(model(ids, use_cache=False).logits, expected, rtol=1e-4, atol=1e-5)
        cache = DMSCache.for_model(model)
        out = [model(input_ids=x, past_key_values=cache).logits for x in ids.split([7, *[1] * 13], 1)]
        torch.testing.assert_close(torch.cat(out, 1), expected, rtol=1e-4, atol=1e-4)
        assert (cache.live_tokens() == 20).all()
    torch.testing.assert_close(detach(model)(ids).logits, expected, rtol=1e-4, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("kind", ["llama", "qwen2", "qwen3"])
def test_neurons_at_zero_merge_nothing_at_any_scale(tiny_model, kind):
    model, ids = attach_dmc(tiny_model(kind, gates=False), DMCConfig(scale=100.0)), tokens(2, 20)
    model.dms.zero_neurons()
    model(ids, use_cache=False)
    assert all((z == -5.0).all() for z in model.dms.step.logits.values())
    assert not any(e.any() for e in model.dms.step.evicted.values())


def test_losses_have_gradients_for_decision_and_weight_neurons(merging):
    model = merging(config=DMCConfig(scale=2.0, offset=1.0, temperature=0.5)).train()
    torch.manual_seed(0)
    ids = tokens(2, 30)
    step = Distiller(model, None)
    for direct in ("kd", "aux"):
        model.zero_grad()
        step.aux_weight = float(direct == "aux")
        parts = step(ids, ids, alpha_target=0.9)
        (parts["loss"]).backward()
        for attention in model.dms.layout.modules:
            key, query = (
                p.weight.grad.unflatten(0, (-1, 8))[:, -1].abs().sum(1) for p in (attention.k_proj, attention.q_proj)
            )
            assert (key > 0).all()
            if direct == "kd":
                assert (query > 0).all()  # every head of the group weighs
    assert 0 < float(parts["evicted"]) < 1


def test_soft_shares_near_zero_temperature_equal_hard_decisions(merging):
    """The soft form with a negligible temperature and no noise to speak of: the two forms are one."""
    model = merging(config=DMCConfig(scale=1e6, offset=0.0, temperature=1e-3))
    ids = tokens(2, 25)
    with torch.no_grad():
        hard = model(ids, use_cache=False).logits
        soft = model.train()(ids, use_cache=False).logits
    torch.testing.assert_close(soft, hard, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_row_operations_leave_other_rows_unchanged(merging):
    model, ids = merging(), tokens(4, 24)
    whole = model(input_ids=ids, use_cache=False).logits
    cache = DMSCache.for_model(model)
    model(input_ids=ids[:3, :10], past_key_values=cache)
    second = DMSCache.for_model(model)
    model(input_ids=ids[3:, :14], past_key_values=second)
    live = cache.empty_like(3)
    live.put_rows(torch.tensor([0, 1, 2]), cache, torch.tensor([2, 0, 1]))
    live.reset_rows(torch.tensor([1]))
    live.put_rows(torch.tensor([1]), second, torch.tensor([0]))
    live.batch_select_indices(torch.tensor([1, 2]))  # rows 3 and 1 of ids
    for t in range(10):
        mask = torch.tensor([[1], [int(t < 5)]])  # then the second row is idle
        place = torch.tensor([[14 + t], [min(10 + t, 23)]])
        step = torch.stack([ids[3, 14 + t : 15 + t], ids[1, 10 + t : 11 + t]])
        out = model(input_ids=step, attention_mask=mask, position_ids=place, past_key_values=live).logits
        torch.testing.assert_close(out[0, 0], whole[3, 14 + t], rtol=1e-4, atol=1e-4)
        if t < 5:
            torch.testing.assert_close(out[1, 0], whole[1, 10 + t], rtol=1e-4, atol=1e-4)
    assert live.tokens_seen().tolist() == [24, 15]


def test_chains_do_not_depend_on_the_batch(merging):
    model, tokenizer = merging(), make_tokenizer()
    prompts, jobs = [tokens(1, n, n)[0].tolist() for n in (5, 9, 6)], [(p, c) for p in range(3) for c in range(2)]
    drawn = []
    for batch in (2, 6):
        config = SamplingConfig(max_new_tokens=80, batch=batch)
        chains = sorted(sample_chains(model, tokenizer, prompts, jobs, config), key=lambda c: (c.problem, c.chain))
        drawn.append([(c.tokens, c.live, c.reads) for c in chains])
    assert drawn[0] == drawn[1]
    assert all(live[-1] < 0.9 * (len(made) + 5) for made, live, _ in drawn[0] if len(made) > 20)


def test_the_dms_trainer_trains_dmc_and_keeps_its_family(tiny_model, tmp_path):
    documents = [{"input_ids": row.tolist(), "labels": row.tolist()} for row in tokens(6, 15)]
    recipe = RetrofitConfig(final_cr=3.0, steps_per_unit=3, batch=2, lr=1e-2)
    model = retrofit(
        tiny_model(gates=False), make_tokenizer(), documents, CONFIG, recipe, tmp_path, attach=attach_dmc, use_cpu=True
    )
    ids = tokens(1, 20)
    with torch.no_grad():
        expected = model(ids, use_cache=False).logits
        assert torch.equal(load_dmc(checkpoint_dir(tmp_path, 3.0))(ids, use_cache=False).logits, expected)
        assert not torch.equal(load_dmc(checkpoint_dir(tmp_path, 2.0))(ids, use_cache=False).logits, expected)


@pytest.mark.slow
def test_retrofit_of_the_embedded_model_reaches_its_ratio(tmp_path):
    tokenizer, settings = load_tokenizer(REASONER), DMCConfig(scale=100.0)
    steps = {"final_cr": 2.0, "steps_per_unit": 20, "rests": ((2.0, 15),), "batch": 4}
    recipe = RetrofitConfig(**steps, optimizer="muon", lr=1.5e-3, aux_weight=10.0, neuron_zero=True)
    data = TraceDataset(tokenizer, recipe.steps * recipe.batch, recipe.batch)
    model = retrofit(
        load_base(REASONER),
        tokenizer,
        data,
        settings,
        recipe,
        tmp_path,
        attach=attach_dmc,
        use_cpu=True,
        train_sampling_strategy="sequential",
    )
    unseen = TraceDataset(tokenizer, 4, 4, "validation")
    facts = held_out(model, load_base(REASONER), [unseen[i] for i in range(4)], tokenizer.pad_token_id)
    assert facts["cr_decisions"] > 1.7 and facts["kl"] < 0.5


def test_saved_dmc_and_dms_models_load_with_their_own_loaders(merging, tmp_path):
    from dms_core import load_model

    model = merging(config=DMCConfig(scale=3.0))
    save_model(model, tmp_path, cr=2.0)
    loaded, ids = load_dmc(tmp_path), tokens(1, 9)
    assert torch.equal(loaded(ids, use_cache=False).logits, model(ids, use_cache=False).logits)
    with pytest.raises(ValueError, match="unknown DMS settings"):
        load_model(tmp_path)


def test_wrong_uses_of_dmc_are_named(tiny_model, merging, tmp_path):
    with pytest.raises(ValueError, match="scale 0: must be > 0"):
        DMCConfig(scale=0)
    with pytest.raises(ValueError, match="of method 'dms': must be of method 'dmc'"):
        DMCConfig.from_dict({"scale": 1.0})
    with pytest.raises(ValueError, match=r"\['window'\]: must be of method"):
        DMCConfig.from_dict({"method": "dmc", "window": 12})
    with pytest.raises(ValueError, match="already has gates"):
        attach_dmc(merging(), CONFIG)
    with pytest.raises(ValueError, match="neuron 8: must lie in"):
        attach_dmc(tiny_model(gates=False), DMCConfig(neuron=8))
