import time
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from transformers import DynamicCache

from companion.experiments import main
from companion.experiments import runtime as module
from companion.experiments.dense_rows import DenseRows, sample_dense
from companion.experiments.profiles import get_profile
from companion.experiments.run import Run
from companion.experiments.runtime import Plan, measure, parse_bytes, runtime
from companion.method import Method
from companion.tasks.embedded import Traces
from companion.tasks.reasoner import make_tokenizer
from dms_core import sampling
from dms_core.budgets.voting import RECORD_KEYS
from dms_core.sampling import SamplingConfig, sample_chains
from dms_core.storage import read_json, read_jsonl

TOKENIZER = make_tokenizer()
TASK = Traces(size=6, split="validation", variables=(1, 4))
PROMPTS = [TASK.prompt_ids(TOKENIZER, problem) for problem in TASK.problems]
JOBS = [(p, c) for p in range(6) for c in range(3)]
CONFIG = SamplingConfig(max_new_tokens=40, temperature=1.0, top_p=0.98, stride=8)
DENSE, DMS = Method("vanilla", 1.0), Method("dms", 2.0)
PLAN = Plan(memory=150_000, chains=3, blocks=3, pilot=5)


@pytest.fixture(scope="module")
def models(tiny_model):
    return {method: (tiny_model(vocabulary=len(TOKENIZER), window=4), "weights") for method in (DENSE, DMS)}


@pytest.fixture(scope="module")
def model(models):
    return models[DENSE][0]


def config(batch):
    return SamplingConfig(40, batch=batch, temperature=1.0, top_p=0.98, stride=8)


def timed(models, out, plan=PLAN):
    return measure(models, TOKENIZER, TASK, CONFIG, plan, out)


# The dense model in transformers' cache.


@pytest.mark.parametrize("batch", [1, 4, 7, 18])
def test_dense_chains_equal_those_of_the_disabled_model(model, batch):
    with model.dms.disabled():
        ours = list(sample_chains(model, TOKENIZER, PROMPTS, JOBS, config(batch)))
    theirs = list(sample_dense(model, TOKENIZER, PROMPTS, JOBS, config(batch)))
    assert theirs == ours  # tokens, order, live tokens and reads
    assert 0 < sum(chain.finished for chain in ours) < len(JOBS) and len({len(p) for p in PROMPTS}) > 3
    assert model.dms.enabled


def test_dense_sampling_uses_the_original_attention_and_leaves_no_hook(model, monkeypatch):
    before, seen = len(model._forward_pre_hooks), []
    monkeypatch.setattr(DenseRows, "make_room", lambda self: seen.append(model.dms.text._attn_implementation) and False)
    list(sample_dense(model, TOKENIZER, PROMPTS, JOBS[:2], config(2)))
    assert set(seen) == {"sdpa"} and len(model._forward_pre_hooks) == before


def test_dense_rows_have_no_more_columns_than_the_longest_row(model, monkeypatch):
    whole_mask, spare = DenseRows.whole_mask, []

    def watched(self, valid):
        if valid.shape[1] == 1:
            spare.append(self.get_seq_length() - int(self.seen.max()))
        return whole_mask(self, valid)

    monkeypatch.setattr(DenseRows, "whole_mask", watched)
    list(sample_dense(model, TOKENIZER, PROMPTS, JOBS, config(4)))
    assert set(spare) == {0}


# A chain's seconds.


@pytest.mark.parametrize("draw", [sample_dense, sample_chains])
@pytest.mark.parametrize("batch", [1, 5])
def test_seconds_of_all_chains_are_the_wall_time_of_generation(model, draw, batch):
    began, slept, chains = time.perf_counter(), 0.0, []
    for chain in draw(model, TOKENIZER, PROMPTS, JOBS, config(batch)):
        chains.append(chain)
        paused = time.perf_counter()
        time.sleep(0.02)  # the caller's time is not the sampler's
        slept += time.perf_counter() - paused
    wall = time.perf_counter() - began - slept
    assert 0.8 * wall < sum(chain.seconds[-1] for chain in chains) < 1.02 * wall
    for chain in chains:
        assert len(chain.seconds) == len(chain.reads)
        assert chain.seconds[0] > 0 and chain.seconds == sorted(chain.seconds)


@pytest.fixture
def clock(monkeypatch):
    """The sampler's clock, which stands still but in prefills and decode steps: one second each."""
    now = [0.0]
    monkeypatch.setattr(sampling, "time", SimpleNamespace(perf_counter=lambda: now[0]))
    for name in ("_admit", "_decode"):
        call = getattr(sampling._Batch, name)

        def ticking(self, *args, call=call):
            now[0] += 1
            call(self, *args)

        monkeypatch.setattr(sampling._Batch, name, ticking)
    return now


@pytest.mark.parametrize("draw", [sample_dense, sample_chains])
def test_no_second_is_lost_or_counted_twice(model, clock, draw):
    chains = list(draw(model, TOKENIZER, PROMPTS, JOBS, config(10)))  # rows stand empty and the batch shrinks
    assert 0 < sum(chain.finished for chain in chains) < len(JOBS)
    assert sum(chain.seconds[-1] for chain in chains) == pytest.approx(clock[0])


@pytest.mark.parametrize("batch", [1, 6])
def test_a_step_is_divided_among_the_rows_under_way(model, clock, batch):
    chains = list(sample_chains(model, TOKENIZER, PROMPTS, JOBS, config(batch), stop=()))
    assert {len(chain.tokens) for chain in chains} == {40} and clock[0] == 40 * 18 / batch
    for chain in chains:  # after 0, 8, ..., 40 tokens and at the end; the prefill gives the first token
        assert chain.seconds == pytest.approx([x / batch for x in (1, 8, 16, 24, 32, 40, 40)])


# The batch that a memory holds.


def test_the_batch_is_what_the_memory_holds(models, tmp_path):
    with torch.no_grad():
        cache, layers = DynamicCache(), models[DENSE][0]
        with layers.dms.disabled():
            layers(torch.ones(1, 10, dtype=torch.long), past_key_values=cache)
    token = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers) / 10
    found = {}
    for memory in (1, 150_000, 300_000):
        result = timed(models, tmp_path, Plan(memory, 1, pilot=5))
        assert result["memory"] == memory and {len(r["seconds"]) - len(r["reads"]) for r in result["records"]} == {0}
        for name, facts in result["methods"].items():
            assert facts["row_bytes"] == pytest.approx(token * facts["peak_tokens"], abs=token / 50)
            assert facts["batch"] == max(1, memory // facts["row_bytes"])
            found[name, memory] = facts["batch"]
        dense, sparse = result["methods"].values()
        assert sparse["peak_tokens"] < dense["peak_tokens"] <= max(map(len, PROMPTS)) + 39
    assert found["vanilla-cr1", 1] == found["dms-cr2", 1] == 1
    assert 1 < found["vanilla-cr1", 150_000] < found["dms-cr2", 150_000] < found["dms-cr2", 300_000]


@pytest.mark.parametrize(
    "text, size", [("4096", 4096), ("2MB", 2_000_000), ("1.5kB", 1500), ("512 KiB", 2**19), ("1GiB", 2**30)]
)
def test_bytes_are_parsed(text, size):
    assert parse_bytes(text) == size


@pytest.mark.parametrize("text", ["", "MB", "0", "2TB", "-1MB", "2MBs", "0.1"])
def test_what_is_no_number_of_bytes_is_refused(text):
    with pytest.raises(ValueError, match=f"memory {text}: must be a number of bytes"):
        parse_bytes(text)


# Records.


def test_every_method_has_every_chain_with_the_texts_of_the_usual_path(models, tmp_path, monkeypatch):
    used, plain = [], module.sample_chains
    monkeypatch.setattr(module, "sample_chains", lambda *args: used.append(args[-1].batch) or plain(*args))
    result = timed(models, tmp_path)
    assert used[1:] == [result["methods"]["dms-cr2"]["batch"]] * 3 and used[-1] > 1  # after the pilot
    for (method, (model, _)), draw in zip(models.items(), (sample_dense, sample_chains), strict=True):
        records = {(r["problem"], r["chain"]): r for r in result["records"] if r["method"] == method.name}
        usual = {(c.problem, c.chain): c for c in draw(model, TOKENIZER, PROMPTS, JOBS, config(3))}
        assert sorted(records) == sorted(usual) == JOBS
        for job, record in records.items():
            assert set(RECORD_KEYS) <= set(record) and record["block"] == job[0] // 2
            assert record["text"] == TOKENIZER.decode(usual[job].tokens)
            assert len(record["seconds"]) == len(record["reads"]) and record["seconds"][-1] > 0
    assert result["machine"]["processor"] and result["machine"]["threads"] == 1


def test_methods_take_turns():
    turns = module._by_turns({"a": iter(range(4)), "b": iter(range(2)), "c": iter(())})
    assert list(turns) == [("a", 0), ("b", 0), ("a", 1), ("b", 1), ("a", 2), ("a", 3)]


def test_interrupted_run_keeps_whole_blocks_and_goes_on(models, tmp_path, monkeypatch):
    turns, begun, stop_at = module._by_turns, [], [11 + 6]  # the first block has 12 chains

    def watched(running):
        begun.append(len(running))
        for pair in turns(running):
            if stop_at and (stop_at.append(stop_at.pop() - 1) or stop_at[0] < 0):
                raise KeyboardInterrupt
            yield pair

    monkeypatch.setattr(module, "_by_turns", watched)
    with pytest.raises(KeyboardInterrupt):
        timed(models, tmp_path)
    before = {file: file.read_text() for file in tmp_path.glob("*.jsonl")}
    assert [text.count("\n") for text in before.values()] == [6, 6] and begun == [2, 2]
    (facts,) = tmp_path.glob("runtime-*.json")
    held = facts.read_text()
    stop_at.clear()
    result = timed(models, tmp_path)
    assert begun[2:] == [0, 2, 2] and facts.read_text() == held  # the first block is there, the second was lost
    for file, text in before.items():
        assert file.read_text().startswith(text)
        assert sorted((r["problem"], r["chain"]) for r in read_jsonl(file)) == JOBS
    assert timed(models, tmp_path) == result and begun[5:] == [0, 0, 0]


def test_a_block_that_was_written_in_part_is_sampled_again_by_all_methods(models, tmp_path):
    result = timed(models, tmp_path)
    file = next(tmp_path.glob("dms-*.jsonl"))
    lost = read_jsonl(file)[-1]
    file.write_text("".join(file.read_text().splitlines(keepends=True)[:-1]))

    def by_job(records):
        return {(r["method"], r["problem"], r["chain"]): r for r in records}

    old, new = by_job(result["records"]), by_job(timed(models, tmp_path)["records"])
    changed = [record for job, record in old.items() if new[job] != record]
    assert {(r["method"], r["block"]) for r in changed} == {(name, lost["block"]) for name in ("dms", "vanilla")}
    assert len(changed) == 12


def test_another_machine_reads_what_is_complete_and_refuses_what_is_not(models, tmp_path, monkeypatch):
    result = timed(models, tmp_path)
    (facts,) = tmp_path.glob("runtime-*.json")
    begun = read_json(facts)["machine"]
    elsewhere = module.describe() | {"processor": "another"}
    monkeypatch.setattr(module, "describe", lambda: elsewhere)
    assert timed(models, tmp_path) == result and result["machine"] == begun
    file = next(tmp_path.glob("dms-*.jsonl"))
    file.write_text("")
    with pytest.raises(ValueError, match=r"was begun on .*: must be finished there"):
        timed(models, tmp_path)


def test_a_run_is_timed_on_all_its_tasks_and_summarised_with_seconds(models, tmp_path, monkeypatch):
    profile = replace(get_profile("smoke"), crs=(DMS.cr,), problems=9, chains=2, lengths=(8, 16), widths=(1, 2))
    run = Run(profile, tmp_path, variants={})
    monkeypatch.setattr(main, "model_of", lambda one, method: models[method])
    monkeypatch.setattr(Run, "tokenizer", TOKENIZER)
    result = runtime(run, 100_000, problems=2, blocks=1)
    assert {row["axis"] for row in result["margins"]} == {"reads", "peak", "seconds"}
    assert list(result["batches"]) == ["traces", "choice", "search"] and result["memory"] == 100_000
    assert {(row["task"], row["problems"]) for row in result["points"]} == {(t, 2) for t in result["batches"]}
    assert read_json(tmp_path / "runtime.json")["machine"] == result["machine"]


def test_wrong_uses_are_refused(models, tmp_path):
    shared = dict.fromkeys(models, models[DMS])
    with pytest.raises(ValueError, match="each method must have one of its own"):
        timed(shared, tmp_path)
    for name in ("memory", "chains", "blocks", "pilot"):
        with pytest.raises(ValueError, match=f"{name} 0: must be >= 1"):
            Plan(**{"memory": 1, "chains": 1, name: 0})
