import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from companion.cost.decode_speed import decode_speed


def test_cache_holds_the_prompt_and_one_item_a_step():
    heads = dict(num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2)
    config = LlamaConfig(vocab_size=64, hidden_size=32, intermediate_size=64, **heads)
    facts = decode_speed(LlamaForCausalLM(config).eval(), [[1, 2, 3], [4, 5]], pad=0, tokens=3)
    assert facts["kv_bytes"] == 2 * 2 * 2 * (3 + 3) * 16 * 4  # K and V, layers, rows, items, width, bytes
    assert facts["tokens_per_s"] > 0


def test_inputs_are_on_the_device_of_the_model():
    class Model:
        device = torch.device("meta")

        def __call__(self, input_ids, attention_mask, position_ids, **_):
            raise RuntimeError(" ".join(x.device.type for x in (input_ids, attention_mask, position_ids)))

    with pytest.raises(RuntimeError, match="meta meta meta"):
        decode_speed(Model(), [[1, 2, 3], [4, 5]], pad=0)
