"""Pages of 8 bits against 16: bytes, distance, and what is compared, on records of a known answer."""

from dataclasses import replace

import pytest

from companion.experiments import int8
from companion.experiments import main as job
from companion.method import Method
from companion.tasks.mixture import TraceDataset

RIGHT = {"auto": 1.0, "int8": 0.5}  # shares of the chains


@pytest.fixture
def run(tmp_path):
    return job.Run.of("smoke", tmp_path)


def test_a_token_of_a_head_takes_64_bytes_more_than_half(run):
    model, _ = job.model_of(run, Method("vanilla", 1.0))
    size = model.config.head_dim
    assert int8.bytes_per_token(model, "auto") == 2 * 2 * size
    assert int8.bytes_per_token(model, "int8") == 2 * (size + 2)


def test_pages_of_8_bits_are_close_to_the_model_and_not_the_same(run):
    model, _ = job.model_of(run, Method("vanilla", 1.0))
    data = TraceDataset(run.tokenizer, 3, 1, "validation", 0)
    documents = [{name: values[:160] for name, values in data[i].items()} for i in range(3)]
    with model.dms.disabled():
        found = int8.fidelity(model, documents, run.tokenizer.pad_token_id)
    assert 0 < found["kl"] < 1e-3 and found["kl_low"] <= found["kl"] <= found["kl_high"] <= found["kl_max"]
    assert found["tokens"] == sum(sum(label != -100 for label in d["labels"]) for d in documents)


def test_rows_and_pairs_of_every_task_by_kind_of_page(run, monkeypatch):
    run = replace(run, profile=replace(run.profile, problems=4))

    def records(one, method):
        right = RIGHT[one.profile.kv_cache_dtype] * one.profile.problems
        facts = {"task": one.task.name, "method": method.name, "cr": method.cr, "tokens": 8, "stride": 16, "text": None}
        facts |= {"prompt_tokens": 3, "prompt_live": 3.0, "live": [3.0, 8.0], "reads": [0.0, 40.0], "finished_at": 8}
        pairs = [(p, c) for p in range(one.profile.problems) for c in range(one.profile.chains)]
        return [facts | {"problem": p, "chain": c, "gold": "7", "answer": "7" if p < right else "8"} for p, c in pairs]

    monkeypatch.setattr(job, "records", records)
    monkeypatch.setattr(int8, "fidelity", lambda model, documents, pad: {"kl": 0.0, "kl_low": 0.0, "kl_high": 0.0})
    told = []
    monkeypatch.setattr(job, "model_of", lambda run, method, found=job.model_of: found(run, Method("vanilla", 1.0)))
    found = int8.compare_pages(run, told.append)
    size = found["bytes"]
    assert {(row["a"], row["b"]) for row in found["margins"]} == set(int8.PAIRS)
    peaks = {row["method"]: row["peak"] for row in found["points"] if row["W"] == 1}
    assert peaks["dms"] == pytest.approx(8 * size["auto"]) and peaks["dms-int8"] == pytest.approx(8 * size["int8"])
    assert {row["difference"] for row in found["paired"]} == {-50.0}
    assert {row["equal"] for row in found["same"]} == {0.5}
