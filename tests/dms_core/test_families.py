"""One mechanism for every decoder: a tiny random model of each type of transformers, built from its configuration."""

import inspect
import warnings

import pytest
import torch
from transformers import MistralConfig, Phi3Config
from transformers.cache_utils import DynamicCache

from companion.families import CHUNK, SLIDING, tiny_config, tiny_model
from dms_core.cache.dms import DMSCache
from dms_core.check import check
from dms_core.config import DMSConfig
from dms_core.model import attach, detach

PASSING = """
apertus arcee biogpt bitnet cohere ernie4_5 gemma glm glm4 gpt2 gpt_bigcode gpt_neox granite helium hunyuan_v1_dense
internlm3 llama ministral3 mistral nanochat nemotron olmo olmo2 opt persimmon phi phi3 qwen2 qwen3 seed_oss smollm3
stablelm starcoder2
dots1 ernie4_5_moe glm4_moe granitemoe mixtral olmoe phimoe qwen2_moe qwen3_moe
cohere2 exaone4 flint gemma2 gemma3_text gemma4_text gpt_oss granite_swa ministral olmo3 llama4_text
falcon_h1 granitemoehybrid lfm2 lfm2_moe nemotron_h olmo_hybrid qwen3_5_text qwen3_5_moe_text qwen3_next zaya
gemma3 gemma4_unified internvl llama4 llava mistral3 qwen2_vl qwen2_5_vl qwen3_5 qwen3_vl smolvlm
"""  # dense; mixtures of experts; sliding windows, sinks, chunks; states beside attention; text of multimodal models
REFUSED = {
    "bloom": "it adds the mask to its scores itself",
    "deepseek_v3": "multi-head latent attention",
    "diffllama": "layer 0 attends more than once",
    "falcon_mamba": "does not use transformers' attention interface",
    "gemma3n_text": r"layer 0 reads \[4, 1, 7, 32\]",
    "jetmoe": "layer 0 attends to other keys than it puts into its cache",
    "inkling_text": "layer 0: attention with position_bias",
    "mamba": "does not use transformers' attention interface",
    "minimax": "MiniMax uses cache of its own",
    "mllama": "layer 3 with DynamicLayer",
    "paligemma": "attention to other tokens than those before",
    "recurrent_gemma": r"sliding-window attention of \[6\] tokens in all layers: DMS needs full attention",
    "vaultgemma": "attn_logit_softcapping 50.0: must be None",
    "zamba2": "must be its place in the decoder",
}
CONFIG = DMSConfig(window=3, scale=10.0, offset=0.0)


@pytest.mark.every(5)
@pytest.mark.parametrize("family", PASSING.split())
def test_family_passes_every_check(family):
    report = check(tiny_model(family))
    assert report.passes, report.refused or report.details
    assert len(report.checks) == 9


@pytest.mark.parametrize("family", REFUSED)
def test_family_is_refused_at_attach_with_its_name_and_the_reason(family):
    model = tiny_model(family)
    before = model.config.get_text_config()._attn_implementation
    with pytest.raises(ValueError, match=f"^{type(model).__name__}.*{REFUSED[family]}"):
        attach(model, CONFIG)
    assert model.config.get_text_config()._attn_implementation == before and not hasattr(model, "dms")
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


@pytest.mark.parametrize(
    "config, message",
    [
        (tiny_config(Phi3Config, sliding_window=SLIDING), r"\[6\] tokens in all layers"),
        (tiny_config("gemma2", attn_logit_softcapping=50.0), "attn_logit_softcapping 50.0: must be None"),
    ],
    ids=["sliding", "capped"],
)
def test_setting_of_a_family_is_refused(config, message):
    with pytest.raises(ValueError, match=message):
        attach(tiny_model(config.model_type, **config.to_dict()), CONFIG)


@pytest.mark.parametrize(
    "family", ["apertus", "llama", "qwen2", "qwen3", "mistral", "smollm3", "gemma3_text", "qwen3_moe"]
)
@torch.no_grad()
def test_neuron_gates_generate_the_full_forward(family):
    model = gated(family, gate="neuron")
    ids = torch.randint(3, 40, (1, 13), generator=torch.Generator().manual_seed(0))
    said = model.generate(ids, max_new_tokens=12, do_sample=False, eos_token_id=None)
    assert torch.equal(said[:, 13:], model(said[:, :-1], use_cache=False).logits[:, 12:].argmax(-1))


def gated(family: str, gate: str = "adapter", window: int = 3, **settings):
    model = tiny_model(family, **settings)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        attach(model, DMSConfig(gate=gate, window=window, scale=10.0, offset=0.0))
    for parameter in model.dms.gate_parameters():
        torch.nn.init.normal_(parameter, generator=torch.Generator().manual_seed(0))
    return model


@pytest.mark.parametrize("family, kind", [("gemma3_text", "sliding window"), ("llama4_text", "chunks")])
def test_layers_that_see_a_part_get_no_gate_and_a_warning(family, kind):
    model = tiny_model(family)
    with pytest.warns(UserWarning, match=rf"layers \[0, 1.*\] keep their {kind}"):
        attach(model, CONFIG)
    local = model.dms.layout.sliding if kind == "sliding window" else model.dms.layout.chunks
    assert set(local) == {None, SLIDING if kind == "sliding window" else CHUNK}
    assert [hasattr(a, "dms_gate") for a in model.dms.layout.modules] == [tokens is None for tokens in local]
    model.train()(torch.ones(1, 20, dtype=torch.long), use_cache=False)
    assert sorted(model.dms.step.evicted) == model.dms.layout.gated


@torch.no_grad()
def test_layers_hold_what_they_see_and_no_more():
    """Full attention: what is kept; a sliding window: its tokens; chunks: the one under way."""
    ids = torch.randint(3, 40, (2, 29), generator=torch.Generator().manual_seed(0))
    for family, held in (("gemma3_text", SLIDING), ("llama4_text", 29 % CHUNK)):
        model = gated(family)
        cache = DMSCache.for_model(model, page=4)
        for piece in ids.split([17, *[1] * 12], 1):
            model(piece, past_key_values=cache)
        live, local = (
            cache.live_tokens(),
            [a or b for a, b in zip(model.dms.layout.sliding, model.dms.layout.chunks, strict=True)],
        )
        for layer, tokens in zip(live, local, strict=True):
            assert (layer == held).all() if tokens else (layer < 29).all()
        assert (cache.peak_tokens() >= live).all()


@torch.no_grad()
def test_hybrid_counts_keys_and_values_apart_from_states():
    model = gated("qwen3_next")
    cache, theirs = DMSCache.for_model(model, page=4), DynamicCache(config=model.config)
    ids = torch.randint(3, 40, (2, 30), generator=torch.Generator().manual_seed(0))
    sizes = []
    for piece in ids.split([20, *[1] * 10], 1):
        model(piece, past_key_values=cache)
        sizes.append(cache.bytes_of_states())
    with model.dms.disabled():
        model(ids, past_key_values=theirs)
    assert cache.live_tokens().shape == (2, 2, 2) and (cache.live_tokens() < 30).any()  # two of the four layers
    states = [x for layer in theirs.layers[:2] for d in (layer.conv_states, layer.recurrent_states) for x in d.values()]
    assert set(sizes) == {sum(x.nbytes for x in states)}
    assert cache.bytes_held() == sum(x.rows.nbytes for x in cache.held) > 0


@torch.no_grad()
def test_image_tokens_that_see_each_other_are_refused():
    model = gated("gemma3")
    kinds = torch.zeros(1, 9, dtype=torch.long)
    kinds[:, 2:6] = 1  # tokens of an image
    with pytest.raises(ValueError, match="tokens that see later ones"):
        model(torch.ones(1, 9, dtype=torch.long), token_type_ids=kinds, pixel_values=None)


def test_two_models_of_one_configuration_run_side_by_side():
    config = tiny_config(MistralConfig)
    one, two = type(tiny_model("mistral"))(config).eval(), type(tiny_model("mistral"))(config).eval()
    ids = torch.ones(1, 9, dtype=torch.long)
    with torch.no_grad():
        expected = two(ids).logits
        attach(one, CONFIG)(ids)
        assert torch.equal(two(ids).logits, expected)
    assert one.config is not config and two.config is config


def test_unknown_family_is_an_error():
    with pytest.raises(ValueError, match="family 'lama': must be a model type of transformers"):
        tiny_model("lama")


def positions(mask: torch.Tensor) -> torch.Tensor:
    return (mask.cumsum(1) - 1).clamp_min(0)


@torch.no_grad()
def test_rows_of_a_hybrid_take_no_padding_after_a_past():
    """transformers masks states in a first prefill alone: padding is refused later, and a row that skipped a step."""
    model = gated("qwen3_next")
    ids = torch.randint(3, 40, (2, 12), generator=torch.Generator().manual_seed(0))
    cache = DMSCache.for_model(model)
    mask = torch.ones(2, 8, dtype=torch.long)
    mask[0, :3] = 0
    model(ids[:, :8], attention_mask=mask, position_ids=positions(mask), past_key_values=cache)
    turn = torch.tensor([[0, 1, 1], [1, 1, 1]])
    with pytest.raises(ValueError, match="padding after a past: must be none"):
        model(ids[:, :3], attention_mask=torch.cat([mask, turn], 1), past_key_values=cache)
    one = {"position_ids": torch.full((2, 1), 8), "past_key_values": cache}
    model(ids[:, :1], attention_mask=torch.tensor([[1], [0]]), **one)
    other = cache.empty_like(2)
    other.put_rows(torch.tensor([1]), cache, torch.tensor([0]))
    model(ids[:1, :1].expand(2, 1), attention_mask=torch.tensor([[0], [1]]), **{**one, "past_key_values": other})
    with pytest.raises(ValueError, match="a row skipped a step and then continued"):
        model(ids[:, :1], attention_mask=torch.ones(2, 1), **one)
    cache.reset_rows(torch.tensor([1]))
    model(ids[:, :1], attention_mask=torch.ones(2, 1), **one)


@pytest.mark.parametrize("family, rows", [("qwen2_vl", 4), ("llama", 1)])
@torch.no_grad()
def test_packed_documents_are_kept_apart_whatever_the_shape_of_their_positions(family, rows):
    """Qwen-VL gives the text's positions and three of an image; others one row for the whole batch."""
    model = gated(family)
    ids = torch.randint(3, 40, (2, 16), generator=torch.Generator().manual_seed(0))
    place = torch.cat([torch.arange(9), torch.arange(7)])
    place = place.expand(4, 2, -1) if rows == 4 else place[None]
    other = ids.clone()
    other[:, :9] = 7
    first, second = (model(x, position_ids=place, use_cache=False).logits[:, 9:] for x in (ids, other))
    torch.testing.assert_close(first, second)


@torch.no_grad()
def test_padding_mask_of_a_multimodal_model_counts_when_given_by_position():
    model = gated("gemma3")
    ids, mask = torch.ones(2, 9, dtype=torch.long), torch.ones(2, 9, dtype=torch.long)
    mask[0, :4] = 0
    names = list(inspect.signature(model.forward).parameters)
    assert names[0] == "input_ids"
    before = [None] * (names.index("attention_mask") - 1)
    assert torch.equal(model(ids, *before, mask).logits, model(ids, attention_mask=mask).logits)


def test_layers_with_other_numbers_of_heads_count_in_means():
    cache = DMSCache(CONFIG, 2)
    for layer, heads in zip(cache.layers, (3, 5), strict=True):
        layer.lazy_initialization(torch.zeros(1, heads, 0, 8))
        layer.rows.length.copy_(torch.arange(heads))
    assert cache.live_tokens().shape == (2, 1, 15)
    assert cache.live_tokens().float().mean(2)[:, 0].tolist() == [1.0, 2.0]


@torch.no_grad()
def test_offloaded_model_gets_gates_where_it_computes():
    model, ids = tiny_model("llama"), torch.ones(1, 9, dtype=torch.long)
    expected = model(ids).logits
    accelerate = pytest.importorskip("accelerate")
    attach(accelerate.cpu_offload(model), CONFIG)
    assert all(p.device.type == "cpu" for p in model.dms.gate_parameters())
    torch.testing.assert_close(model(ids, use_cache=False).logits, expected)


def test_changes_of_the_configuration_outlive_detach():
    model = attach(tiny_model("llama"), CONFIG)
    model.resize_token_embeddings(70)
    assert detach(model).config.vocab_size == 70 and model.config._attn_implementation == "sdpa"


def test_check_leaves_gradients_and_single_modules_alone_and_wants_fp32():
    model = tiny_model("llama").train()
    model.model.layers[1].eval()
    model.lm_head.weight.grad = torch.ones_like(model.lm_head.weight)
    assert check(model).passes
    assert model.training and not model.model.layers[1].training and (model.lm_head.weight.grad == 1).all()
    with pytest.raises(ValueError, match=r"model of torch\.bfloat16: must be torch\.float32"):
        check(tiny_model("llama").bfloat16())


@torch.no_grad()
def test_tuple_of_a_call_without_a_cache_holds_logits_alone():
    assert len(gated("llama")(torch.ones(1, 5, dtype=torch.long), return_dict=False)) == 1
