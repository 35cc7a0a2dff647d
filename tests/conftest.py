import os
import re
from collections import Counter
from functools import partial

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
import torch
from hypothesis import HealthCheck, Phase, settings

settings.register_profile(
    "repeatable",
    derandomize=True,
    database=None,
    deadline=None,
    print_blob=True,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
settings.register_profile(  # for tests that mostly fail: see tests/support/mutants.py
    "mutants", settings.get_profile("repeatable"), phases=[Phase.explicit, Phase.generate], max_examples=25
)
settings.load_profile("repeatable")

# What the reason of a skipped test says, and how to have the test run.
REMEDIES = {
    "ordinary user": "a machine with /usr/bin/python3 that allows user namespaces",
    "no sandbox here": "apt-get install bubblewrap",
    "needs a CUDA device": "make gpu-check, on a machine with a GPU",
    "(chromium|node|firefox) is not installed": "apt-get install chromium nodejs firefox-esr",
    "is not installed|could not import": "make setup",
}
VOCABULARY = 40
LONGEST = (  # files of about 20 s and more, longest first
    "tests/companion/test_reproduce.py",
    "tests/dms_core/train/test_processes.py",
    "tests/test_accelerator.py",
    "tests/workflow/test_workflow.py",
    "tests/test_documented_commands.py",
    "tests/dms_core/cache/test_stateful_baselines.py",
    "tests/dms_core/cache/test_stateful.py",
    "tests/test_wheel.py",
    "tests/dms_core/train/test_scale.py",
    "tests/workflow/test_settings.py",
    "tests/dms_core/test_reproducible.py",
    "tests/dms_kernels/test_aot.py",
    "tests/companion/tasks/test_lm_eval.py",
    "tests/companion/test_book.py",
)


def pytest_configure(config):
    """Only ``-m gpu`` uses a card.  Otherwise it is hidden, and Triton's kernels run in its interpreter on the CPU.

    Nothing may have asked torch for a card, or imported triton, before; worker processes inherit what is set here.
    """
    if not wants_card(config.getoption("markexpr")):
        os.environ |= {"CUDA_VISIBLE_DEVICES": "", "TRITON_INTERPRET": "1"}


def wants_card(expression: str) -> bool:
    """Whether ``-m EXPRESSION`` selects tests that are marked ``gpu``."""
    return bool(re.search(r"\bgpu\b", re.sub(r"\bnot\s+gpu\b", "", expression)))


def pytest_addoption(parser):
    parser.addoption("--require-sandbox", action="store_true", help="fail, not skip, the tests that bubblewrap is for")
    parser.addoption("--write-page", action="store_true", help="tests/test_faults.py writes book/faults.md")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    """All but some cases of a test marked ``every`` become slow, before those that -m does not select are dropped.

    Files with tests marked ``forks`` come first, and compute no gradient outside of forks: torch refuses a backward
    pass in a fork of a process whose autograd has started threads for a device, as that of the stand-in device does.
    Then the longest, as ``make test`` gives whole files to its processes, which so end together.
    """
    met = Counter()
    for item in items:
        if marker := item.get_closest_marker("every"):
            test = item.nodeid.partition("[")[0]
            if met[test] % marker.args[0]:
                item.add_marker(pytest.mark.slow)
            met[test] += 1
    forking = {item.path for item in items if item.get_closest_marker("forks")}
    longest = {name: place for place, name in enumerate(LONGEST)}

    def key(item):
        return item.path not in forking, longest.get(item.nodeid.partition("::")[0], len(longest))

    items.sort(key=key)


def pytest_runtest_setup(item):
    if item.get_closest_marker("sandbox"):
        _need_sandbox(item.config)


def _need_sandbox(config, reason=None):
    from companion.tasks.sandbox import sandbox

    if reason := reason or sandbox.why_not():
        (pytest.fail if config.getoption("require_sandbox") else pytest.skip)(f"no sandbox here: {reason}")


@pytest.fixture
def need_sandbox(request):
    """A function that skips (--require-sandbox: fails) the test where bubblewrap cannot run, or for a given reason."""
    return partial(_need_sandbox, request.config)


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_terminal_summary(terminalreporter):
    """At the very end a line for each kind of skipped tests: how many, why, and how to have them run."""
    yield
    skipped = terminalreporter.stats.get("skipped", [])
    reasons = [str(report.longrepr[2]).removeprefix("Skipped: ").splitlines()[0] for report in skipped]
    for kind, remedy in REMEDIES.items():
        if found := [reason for reason in reasons if re.search(kind, reason)]:
            reasons = [reason for reason in reasons if reason not in found]
            line = f"NOT RUN: {len(found)} tests ({'; '.join(sorted(set(found)))}). To run them: {remedy}"
            terminalreporter.write_line(line, red=True, bold=True)


def _tiny_config(kind: str, vocabulary: int):
    from transformers import LlamaConfig, Qwen2Config, Qwen3Config

    cls = {"llama": LlamaConfig, "qwen2": Qwen2Config, "qwen3": Qwen3Config}[kind]
    extra = {} if kind == "qwen2" else {"head_dim": 8}
    return cls(
        vocab_size=vocabulary,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        initializer_range=0.25,
        tie_word_embeddings=kind != "qwen3",
        pad_token_id=0,
        bos_token_id=None,
        eos_token_id=None,
        attn_implementation="sdpa",
        **extra,
    )


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
