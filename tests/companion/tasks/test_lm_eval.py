import json
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

pytest.importorskip("lm_eval")
from lm_eval import simple_evaluate
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM

import companion.tasks
from companion.cli.main import main
from companion.tasks.lm_eval import DMSLM, evaluate, find_tasks
from companion.tasks.programs import make_problem
from companion.tasks.reasoner import load_tokenizer
from dms_core.cache.dms import DMSCache
from dms_core.checkpoint import load_model

ROOT = Path(__file__).parents[3]
CR8 = ROOT / "data" / "reasoner" / "dms-cr8"
DATA = ROOT / "tests" / "data"
PROBLEMS = [make_problem("test", 0, index, (5, 7)) for index in range(40)]
TASKS = ["program_answer", "program_trace"]


def test_committed_problems_match_generator():
    rows = [{"prompt": p.prompt, "trace": p.trace[:-1], "answer": p.answer} for p in PROBLEMS]
    assert (DATA / "problems.jsonl").read_text() == "".join(json.dumps(row) + "\n" for row in rows)


@pytest.fixture(scope="module")
def task_folder(tmp_path_factory):
    """The committed tasks, with absolute paths and a cache of their own: likelihood of an answer, and a trace."""
    folder = tmp_path_factory.mktemp("tasks")
    for name in TASKS:
        text = (DATA / f"{name}.yaml").read_text()
        there = f"data_files: {{test: {DATA / 'problems.jsonl'}}}, cache_dir: {folder / 'cache'}"
        (folder / f"{name}.yaml").write_text(text.replace("data_files: {test: tests/data/problems.jsonl}", there))
    return folder


@pytest.fixture(scope="module")
def manager(task_folder):
    return find_tasks(TASKS, task_folder, defaults=False)


@pytest.fixture(scope="module")
def sparse(manager):
    """The model at CR 8 and what the harness says of it."""
    lm = DMSLM(str(CR8), batch_size=2)
    return lm, evaluate(lm, TASKS, manager, limit=4)


def ask(lm, kind: str, *arguments) -> list:
    return getattr(lm, kind)([Instance(kind, {}, each, 0) for each in arguments], disable_tqdm=True)


QUESTIONS = [(p.prompt, p.trace) for p in PROBLEMS[:4]]
COMMANDS = [(p.prompt, {"until": ["<eos>"], "do_sample": False, "max_gen_toks": 200}) for p in PROBLEMS[:4]]


@pytest.mark.slow
def test_disabled_gates_match_plain_model(manager):
    plain_model = AutoModelForCausalLM.from_pretrained(CR8).eval()
    plain = HFLM(plain_model, tokenizer=load_tokenizer(CR8), batch_size=2)
    off = DMSLM(str(CR8), gates=False, batch_size=2)
    expected = simple_evaluate(plain, tasks=TASKS, task_manager=manager, limit=4, log_samples=False)
    found = evaluate(off, TASKS, manager, limit=4)
    assert found["results"] == expected["results"] and found["samples"] == dict.fromkeys(TASKS, 4)
    assert found["results"]["program_trace"]["exact_match,answer"] > 0
    assert ask(off, "generate_until", *COMMANDS) == ask(plain, "generate_until", *COMMANDS)
    ours, theirs = (torch.tensor(ask(lm, "loglikelihood", *QUESTIONS)) for lm in (off, plain))
    assert torch.allclose(ours, theirs, atol=1e-3)
    kv = off.budget()
    assert kv["cr_reads"] == kv["cr_peak"] == 1 and kv["kv_reads"] == kv["dense_kv_reads"]


def test_compression_shows_in_reads_and_peak(sparse):
    kv = sparse[1]["kv"]
    assert kv["generations"] == 4 and sparse[1]["gates"]
    assert kv["kv_reads"] < kv["dense_kv_reads"] / 2 and kv["peak_tokens"] < kv["dense_peak_tokens"] / 2
    assert kv["cr_reads"] == pytest.approx(kv["dense_kv_reads"] / kv["kv_reads"])


@torch.no_grad()
def test_loglikelihood_matches_decoding_with_cache(sparse):
    tokenizer, model = load_tokenizer(CR8), load_model(CR8)
    for (prompt, trace), (found, greedy) in zip(QUESTIONS, ask(sparse[0], "loglikelihood", *QUESTIONS), strict=True):
        context, ids = tokenizer(prompt)["input_ids"], tokenizer(trace)["input_ids"]
        cache, said, best = DMSCache.for_model(model), 0.0, True
        logits = model(torch.tensor([context]), past_key_values=cache).logits[0, -1]
        for token in ids:
            said += logits.log_softmax(-1)[token].item()
            best = best and logits.argmax() == token
            logits = model(torch.tensor([[token]]), past_key_values=cache).logits[0, -1]
        assert found == pytest.approx(said, abs=2e-3) and greedy == best


def test_stock_hf_class_generates_the_same_text(sparse):
    """generate() makes an empty cache of its own; attach has it replaced, and the text is that of our class."""
    stock = HFLM(load_model(CR8), tokenizer=load_tokenizer(CR8), batch_size=2)
    assert ask(stock, "generate_until", *COMMANDS) == ask(sparse[0], "generate_until", *COMMANDS)
    output = stock.model.generate(
        torch.tensor([[5, 6, 7]]), max_new_tokens=2, do_sample=False, return_dict_in_generate=True
    )
    assert isinstance(output.past_key_values, DMSCache)


def test_budget_is_exact_at_batch_size_one(sparse):
    lm = DMSLM(str(CR8), batch_size=1)
    (text,) = ask(lm, "generate_until", COMMANDS[0])
    cache, tokenizer = DMSCache.for_model(lm.model), load_tokenizer(CR8)
    inputs = torch.tensor([tokenizer(PROBLEMS[0].prompt)["input_ids"]])
    out = lm.model.generate(inputs, past_key_values=cache, max_new_tokens=200, do_sample=False)
    tokens, prompt = out.shape[1] - 1, inputs.shape[1]  # the last token is never fed
    assert text == tokenizer.decode(out[0, prompt:], skip_special_tokens=True)
    kv = lm.budget()
    assert kv["dense_peak_tokens"] == tokens and kv["dense_kv_reads"] == sum(range(prompt + 1, tokens + 1))
    assert kv["kv_reads"] == pytest.approx(cache.kv_reads().double().mean().item())
    assert kv["peak_tokens"] == pytest.approx(cache.peak_tokens().double().mean().item())


def test_plain_directory_runs_dense_and_model_without_gates_is_rejected():
    lm = DMSLM(str(ROOT / "data" / "reasoner"))
    assert not lm.gates
    ask(lm, "generate_until", COMMANDS[0])
    assert lm.budget()["cr_reads"] == 1
    with pytest.raises(ValueError, match=r"LlamaForCausalLM has no DMS gates"):
        DMSLM(AutoModelForCausalLM.from_pretrained(CR8), tokenizer=load_tokenizer(CR8))


@pytest.mark.slow  # the harness indexes its own fourteen thousand tasks first
def test_the_command_prints_what_the_harness_found(task_folder, sparse, capsys):
    command = ["eval", "--model", str(CR8), "--tasks", ",".join(TASKS), "--include", str(task_folder)]
    assert main([*command, "--limit", "2", "--batch-size", "2", "--device", "cpu", "--json"]) == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert set(result["results"]) == set(result["samples"]) == set(TASKS) and result["model"] == str(CR8)
    assert set(result["samples"].values()) == {2} and result["kv"]["generations"] == 2 and result["gates"]


@pytest.mark.parametrize(
    "change, message",
    [
        (["--limit", "0"], "limit 0: must be >= 1"),
        (["--batch-size", "-1"], "batch-size -1: must be >= 1"),
        (["--include", "nowhere"], "nowhere: not a folder"),
    ],
)
def test_eval_command_rejects_wrong_input(change, message, capsys):
    assert main(["eval", "--model", str(CR8), "--tasks", "x", *change]) == 2
    assert message in capsys.readouterr().err


def test_unknown_task_is_named(task_folder):
    with pytest.raises(ValueError, match=r"tasks \['program_nothing'\]: not among the 2 known"):
        find_tasks(["program_*", "program_nothing"], task_folder, defaults=False)


def test_missing_package_error_names_install_command(monkeypatch, capsys):
    monkeypatch.delattr(companion.tasks, "lm_eval")
    monkeypatch.delitem(sys.modules, "companion.tasks.lm_eval")
    monkeypatch.setitem(sys.modules, "lm_eval", None)  # its import fails
    assert main(["eval", "--model", "x", "--tasks", "y"]) == 2
    assert "pip install 'dms-companion[eval]'" in capsys.readouterr().err
