import pytest
from transformers import LlamaConfig

from companion.cost import roofline
from companion.cost.roofline import ARCHITECTURES, H100, Architecture, kv_share

LLAMA = ARCHITECTURES["llama-3.1-8b"]
BATCHES = [2**i for i in range(9)]
PRINTED = "0.01 0.02 0.04 0.07 0.12 0.22 0.36 0.53 0.70"  # Fig. 9, one row of Llama 3.1 8B at CR 1


def row(context: float, cr: float = 1.0) -> list[float]:
    return [kv_share(LLAMA, batch, context, cr) for batch in BATCHES]


def printed(shares: list[float]) -> str:
    """Two digits of a value already rounded to three: the rounding under which the paper's digits come out."""
    return " ".join(f"{round(share, 3):.2f}" for share in shares)


def test_printed_row_is_context_1024_and_no_other_power_of_two():
    assert [context for context in (2**i for i in range(7, 18)) if printed(row(context)) == PRINTED] == [1024]
    assert row(1024) == pytest.approx([float(x) for x in PRINTED.split()], abs=0.0056)


@pytest.mark.parametrize("context", [1024, 8192])
def test_doubling_the_context_shifts_the_row_by_one(context):
    assert row(2 * context)[:-1] == row(context)[1:]


def test_compression_divides_the_context():
    assert row(8192, cr=8) == row(1024)


def test_weights_of_llama_8b_are_the_papers():
    assert f"{roofline.weight_bytes(LLAMA):.2e}" == "1.50e+10"


def test_latency_is_the_slower_of_arithmetic_and_reading():
    memory_bound = roofline.latency(LLAMA, 1, 1024)
    assert memory_bound == roofline.reads(LLAMA, 1, 1024) / H100.bandwidth
    compute_bound = roofline.latency(LLAMA, 4096, 1)
    assert compute_bound == roofline.flops(LLAMA, 4096, 1) / H100.flops


def test_architecture_is_read_from_a_transformers_config():
    config = LlamaConfig(
        vocab_size=128256,
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
    )
    assert Architecture.from_config(config) == LLAMA


def test_compression_ratio_below_one_is_refused():
    with pytest.raises(ValueError, match=r"0\.5"):
        kv_share(LLAMA, 1, 1024, 0.5)
