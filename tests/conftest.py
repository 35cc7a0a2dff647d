import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch

if not torch.cuda.is_available():  # before anything imports triton: its kernels then run on the CPU
    os.environ.setdefault("TRITON_INTERPRET", "1")

import pytest
from hypothesis import HealthCheck, settings

settings.register_profile(
    "repeatable",
    derandomize=True,
    database=None,
    deadline=None,
    print_blob=True,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
settings.load_profile("repeatable")

VOCABULARY = 40


def _tiny_config(kind: str, vocabulary: int):
    from transformers import LlamaConfig, Qwen2Config, Qwen3Config

    cls = {"llama": LlamaConfig, "qwen2": Qwen2Config, "qwen3": Qwen3Config}[kind]
    extra = {} if kind == "qwen2" else {"head_dim": 8}
    return cls(
        vocab_size=vocabulary, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=256, initializer_range=0.25, tie_word_embeddings=kind != "qwen3",
        pad_token_id=0, bos_token_id=None, eos_token_id=None, attn_implementation="sdpa", **extra,
    )  # fmt: skip


def _tiny_model(kind: str = "llama", seed: int = 0, gates: bool = True, vocabulary: int = VOCABULARY, **settings):
    """A random decoder of 2 layers; with gates, random ones that mark about half of all tokens."""
    from transformers import AutoModelForCausalLM

    from dms_core.config import DMSConfig
    from dms_core.model import attach

    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(_tiny_config(kind, vocabulary)).eval()
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter, std=0.3)
    if gates:
        attach(model, DMSConfig(**{"window": 3, "scale": 10.0, "offset": 0.0, **settings}))
        for parameter in model.dms.gate_parameters():
            torch.nn.init.normal_(parameter, std=1.0)
    return model


@pytest.fixture(scope="session")
def tiny_model():
    """A function that builds a tiny random model, by default with gates."""
    return _tiny_model


@pytest.fixture(scope="session", autouse=True)
def _one_thread():
    torch.set_num_threads(1)


@pytest.fixture
def load(tmp_path):
    """A task from a file with these rows, or with the one of ``benchmark_rows``."""
    import json

    from benchmark_rows import ROWS

    from companion.tasks import get_task

    def load(name, *rows, **options):
        file = tmp_path / f"{name}.jsonl"
        file.write_text("".join(json.dumps(row) + "\n" for row in rows or [ROWS[name]]))
        return get_task(name, file, **options)

    return load
