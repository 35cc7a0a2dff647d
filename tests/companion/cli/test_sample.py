"""``dms sample``: arguments of chat templates, and checkpoints of the authors' form."""

import json
import shutil
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from companion.cli.main import main
from companion.experiments import sample as module
from companion.method import Method
from companion.paths import REASONER
from companion.tasks import get_task
from companion.tasks.reasoner import load_tokenizer, make_tokenizer
from dms_core.checkpoint import load_base, write_difference
from dms_core.config import DMSConfig
from dms_core.model import attach
from dms_core.storage import read_json, read_jsonl

TEMPLATE = "{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
TEMPLATE += "{% for m in messages %}{{ m.content }}{% endfor %}{% if quiet %}=0;{% endif %}"


@pytest.fixture
def chatty(tmp_path):
    """The embedded model with a chat template that refuses a system message."""
    tokenizer = load_tokenizer(REASONER)
    tokenizer.chat_template = TEMPLATE
    shutil.copytree(REASONER, tmp_path / "chatty", ignore=shutil.ignore_patterns("dms-*"))
    tokenizer.save_pretrained(tmp_path / "chatty")
    return tmp_path / "chatty"


def arguments(model, out, *more) -> list[str]:
    words = ["sample", "--model", model, "--method", "vanilla", "--length", 4, "--out", out, *more]
    return [str(word) for word in words]


def test_template_arguments_name_the_records_and_are_noted(chatty, tmp_path, capsys):
    (tmp_path / "aime.jsonl").write_text(json.dumps({"id": 1, "problem": "1+1", "answer": "2"}) + "\n")
    pytest.importorskip("math_verify")
    common = arguments(chatty, tmp_path / "out", "--task", "aime24", "--source", tmp_path / "aime.jsonl")
    assert main(common) == 0
    (plain,) = (tmp_path / "out" / "records").iterdir()
    assert read_json(tmp_path / "out" / "run.json")["template"] == {}
    assert main([*common, "--template", "quiet=true"]) == 0
    note = read_json(tmp_path / "out" / "run.json")
    assert note["template"] == {"vanilla-cr1": {"quiet": True}}
    assert note["records"]["vanilla-cr1"] != plain.name and len(list((tmp_path / "out" / "records").iterdir())) == 2
    (quiet,) = read_jsonl(tmp_path / "out" / "records" / note["records"]["vanilla-cr1"])
    assert quiet["prompt_tokens"] == read_jsonl(plain)[0]["prompt_tokens"] + len("=0;")
    assert main([*common, "--template", "quiet=false"]) == 0  # the same prompt as without, and yet other records
    assert len(list((tmp_path / "out" / "records").iterdir())) == 3
    capsys.readouterr()
    for given, said in {
        "loud=1": "template argument 'loud': the chat template of",
        "quiet": "--template quiet",
    }.items():
        assert main([*common, "--template", given]) == 2
        assert said in capsys.readouterr().err


def test_system_message_reaches_a_model_whose_template_refuses_one(chatty, tmp_path):
    pytest.importorskip("reasoning_gym")
    common = arguments(chatty, tmp_path / "out", "--task", "reasoning_gym:chain_sum", "--option", "size=1")
    assert main([*common, "--unsafe-execution"]) == 0


@pytest.mark.parametrize("ratio", [8, None])
def test_ratio_is_read_from_a_checkpoint_of_the_authors(tiny_model, tmp_path, monkeypatch, capsys, ratio):
    directory, tokenizer = tmp_path / "theirs", make_tokenizer()
    tiny_model("qwen3", gates=False, vocabulary=len(tokenizer)).save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    keys = {"dms_alpha_scale": 100.0, "dms_initial_alpha_offset": 5.0, "dms_window_size": 4, "dms_cr": ratio}
    config = read_json(directory / "config.json") | keys
    (directory / "config.json").write_text(json.dumps({k: v for k, v in config.items() if k != "dms_cr" or v}))
    place = module.local_directory
    monkeypatch.setattr(module, "local_directory", lambda name: directory if name == "some/Model-DMS" else place(name))
    words = ["sample", "--model", "some/Model-DMS", "--task", "traces", "--limit", "1", "--method", "dms"]
    status = main([*words, "--length", "4", "--out", str(tmp_path / "out"), "--json"])
    said = capsys.readouterr()
    if ratio is None:
        assert status == 2 and "some/Model-DMS does not say its compression ratio: give --cr" in said.err
    else:
        result = json.loads(said.out.splitlines()[-1])
        assert status == 0 and result["cr"] == ratio and Path(result["file"]).name.startswith("dms-cr8-")


def test_adapters_are_sampled_with_their_gates_and_without(tmp_path):
    """Method vanilla with --gates: the weights change, nothing is evicted."""
    gated, name = attach(load_base(REASONER), DMSConfig(window=2, offset=-5.0)), "model.layers.0.mlp.down_proj.weight"
    parts = {f"{name}.up": torch.randn(128, 2), f"{name}.down": torch.randn(2, 384)}
    write_difference(gated, parts, tmp_path / "gates", cr=4.0)
    found = {}
    for label, more in {
        "dense": [],
        "adapted": ["--gates", tmp_path / "gates"],
        "dms": ["--gates", tmp_path / "gates", "--method", "dms"],
    }.items():
        words = arguments(REASONER, tmp_path / label, "--length", 40, "--task", "traces", "--limit", 1, *more)
        assert main([*words, "--temperature", "0"]) == 0
        ((found[label],),) = map(read_jsonl, (tmp_path / label / "records").iterdir())
    assert found["adapted"]["text"] != found["dense"]["text"]
    assert found["adapted"]["live"][-1] == found["adapted"]["prompt_tokens"] + found["adapted"]["tokens"] - 1
    assert found["dms"]["live"][-1] < found["dms"]["prompt_tokens"]


def test_plain_model_is_refused_for_dms(tmp_path, capsys):
    words = ["sample", "--model", str(REASONER), "--task", "traces", "--method", "dms", "--length", "4", "--out"]
    assert main([*words, str(tmp_path / "out")]) == 2
    assert "is not a DMS checkpoint" in capsys.readouterr().err


def test_jobs_that_start_together_all_stay_in_run_json(tmp_path, monkeypatch):
    task, names = get_task("traces", size=1), [f"method{i}" for i in range(8)]
    start, read = threading.Barrier(len(names)), module._noted

    def slowly(out, task):
        found = read(out, task)
        time.sleep(0.02)  # so that all read before the first writes, unless they take turns
        return found

    monkeypatch.setattr(module, "_noted", slowly)

    def job(name):
        start.wait()
        module._note(tmp_path, task, Method(name, 2.0), f"{name}.jsonl", [4], [1], 4)

    with ThreadPoolExecutor(len(names)) as pool:
        list(pool.map(job, names))
    assert read_json(tmp_path / "run.json")["records"] == {f"{name}-cr2": f"{name}.jsonl" for name in names}
    assert [file.name for file in tmp_path.iterdir()] == ["run.json"]
