import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from companion import records as module
from companion.cli.main import main
from companion.method import Method
from companion.records import make_record, records_file, sample_records
from companion.shards import Shard
from companion.tasks.embedded import Traces
from companion.tasks.programs import ANSWER_MARK, make_problem
from companion.tasks.reasoner import make_tokenizer
from dms_core.budgets.curves import summarise
from dms_core.budgets.voting import RECORD_KEYS
from dms_core.sampling import Chain, SamplingConfig
from dms_core.storage import JsonlWriter, read_jsonl

ROOT = Path(__file__).parents[2]
TOKENIZER = make_tokenizer()
TASK = Traces(size=3, split="validation", variables=(1, 3))
TRACE = make_problem("validation", 0, 0, (1, 3)).trace
CONFIG = SamplingConfig(max_new_tokens=24, temperature=1.0, top_p=1.0, batch=4, stride=8)
DMS, VANILLA = Method("dms", 2.0), Method("vanilla", 1.0)


@pytest.fixture(scope="module")
def model(tiny_model):
    return tiny_model(vocabulary=len(TOKENIZER), window=2)


def sample(model, out, method=DMS, config=CONFIG, chains=2, task=TASK):
    file = out / records_file(model, "weights", TOKENIZER, task, method, config, None)
    return sample_records(model, TOKENIZER, task, method, chains, config, file)


def count_jobs(monkeypatch) -> list:
    """The jobs of every call, and with them how much work was done."""
    calls, plain = [], module.sample_chains

    def watched(model, tokenizer, prompts, jobs, config, make_cache):
        calls.append(list(jobs))
        return plain(model, tokenizer, prompts, jobs, config, make_cache)

    monkeypatch.setattr(module, "sample_chains", watched)
    return calls


def test_every_problem_and_chain_has_one_record_in_order(model, tmp_path):
    records = sample(model, tmp_path)
    assert [(r["problem"], r["chain"]) for r in records] == [(p, c) for p in range(3) for c in range(2)]
    assert all(set(RECORD_KEYS) <= set(r) for r in records)
    (file,) = tmp_path.iterdir()
    assert file.name.startswith("dms-cr2-")
    assert sorted(map(json.loads, file.read_text().splitlines()), key=lambda r: (r["problem"], r["chain"])) == records


@pytest.mark.parametrize("cut", [1, 40, 400])
def test_a_killed_run_repeats_and_loses_nothing(model, tmp_path, monkeypatch, cut):
    whole = sample(model, tmp_path / "whole")
    (file,) = (tmp_path / "whole").iterdir()
    text = file.read_text()
    lines = text.splitlines(keepends=True)
    file.write_text("".join(lines[:3]) + lines[3][:cut].rstrip("\n"))  # killed in the middle of the fourth line
    calls = count_jobs(monkeypatch)
    assert sample(model, tmp_path / "whole") == whole
    done = {(json.loads(x)["problem"], json.loads(x)["chain"]) for x in lines[:3]}
    assert calls == [[job for job in ((p, c) for p in range(3) for c in range(2)) if job not in done]]
    assert sorted(file.read_text().splitlines()) == sorted(text.splitlines())
    assert sample(model, tmp_path / "whole") == whole and calls[1] == []


def test_an_interruption_while_sampling_keeps_the_chains_that_ended(model, tmp_path, monkeypatch):
    plain = module.sample_chains

    def interrupted(*args):
        for number, chain in enumerate(plain(*args)):
            if number == 2:
                raise KeyboardInterrupt
            yield chain

    with monkeypatch.context() as patch:
        patch.setattr(module, "sample_chains", interrupted)
        with pytest.raises(KeyboardInterrupt):
            sample(model, tmp_path / "cut")
    (file,) = (tmp_path / "cut").iterdir()
    assert len(file.read_text().splitlines()) == 2
    assert sample(model, tmp_path / "cut") == sample(model, tmp_path / "whole")


def test_more_chains_add_to_the_file_and_leave_the_first_ones_as_they_are(model, tmp_path, monkeypatch):
    two = sample(model, tmp_path)
    calls = count_jobs(monkeypatch)
    four = sample(model, tmp_path, chains=4)
    assert [r for r in four if r["chain"] < 2] == two and len(calls[0]) == 6
    assert len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize(
    "change",
    [{"temperature": 0.5}, {"top_p": 0.5}, {"seed": 1}, {"max_new_tokens": 25}, {"stride": 4}],
    ids=lambda change: next(iter(change)),
)
def test_a_changed_setting_goes_to_another_file(model, tmp_path, change):
    sample(model, tmp_path)
    sample(model, tmp_path, config=replace(CONFIG, **change))
    assert len(list(tmp_path.iterdir())) == 2


def test_changed_task_prompts_weights_or_gates_give_another_file_but_batch_and_page_do_not(model, tiny_model):
    class OtherPrompts(Traces):
        def prompt_ids(self, tokenizer, problem):
            return [2]

    def name(task=TASK, config=CONFIG, used=model, weights="weights"):
        return records_file(used, weights, TOKENIZER, task, DMS, config, None)

    fewer, renamed, newer = (Traces(size=n, split="validation", variables=(1, 3)) for n in (2, 3, 3))
    renamed.name, newer.version = "renamed", 2
    asked = OtherPrompts(size=3, split="validation", variables=(1, 3))
    wider = tiny_model(vocabulary=len(TOKENIZER), window=3)
    assert name() == name(config=replace(CONFIG, batch=1, page=2))
    changed = [name(fewer), name(renamed), name(newer), name(asked), name(weights="others"), name(used=wider)]
    assert len({name(), *changed}) == 7


def test_other_stop_tokens_give_another_file_and_later_settings_at_their_defaults_the_one_of_before(model, monkeypatch):
    def name(**change):
        return records_file(model, "weights", TOKENIZER, TASK, DMS, replace(CONFIG, **change), None)

    before = name()
    assert len({before, name(top_k=5), name(min_p=0.1), name(kv_cache_dtype="int8")}) == 4
    assert name(top_k=None, min_p=0, kv_cache_dtype="auto") == before
    with monkeypatch.context() as patch:
        patch.setattr(module, "LATER", {})
        assert name() != before
    monkeypatch.setattr(model.generation_config, "eos_token_id", TOKENIZER.eos_token_id)
    assert name() == before
    monkeypatch.setattr(model.generation_config, "eos_token_id", [TOKENIZER.eos_token_id, 7])
    assert name() != before


def test_vanilla_is_the_model_with_gates_off(model, tmp_path):
    records = sample(model, tmp_path, VANILLA)
    assert all(r["live"][-1] == r["prompt_tokens"] + r["tokens"] - 1 for r in records)
    assert [r["text"] for r in records] != [r["text"] for r in sample(model, tmp_path)]
    assert model.dms.enabled


def test_records_are_accepted_by_the_curves(model, tmp_path):
    records = [*sample(model, tmp_path, VANILLA), *sample(model, tmp_path)]
    for record, answer in zip(records, "0123456789012", strict=False):  # a random model rarely answers
        record.update(answer=answer, correct=answer == record["gold"], finished_at=min(5, record["tokens"]))
    summary = summarise(records, [8, 24], [1, 2], resamples=20)
    assert len(summary["points"]) == 8
    cheap = {(p["method"], p["L"], p["W"]): p["reads"] for p in summary["points"]}
    assert all(cheap["dms", L, W] < cheap["vanilla", L, W] for L in (8, 24) for W in (1, 2))


def made(text: str, finished: bool = True) -> dict:
    tokens = TOKENIZER(text)["input_ids"]
    chain = Chain(0, 0, tokens, finished, 9, 7.0, [9.0, 12.0], [0.0, 99.0])
    return make_record(chain, TASK, DMS, TOKENIZER, CONFIG)


def test_a_record_says_when_the_answer_was_complete():
    record = made(TRACE)
    assert record["answer"] == record["gold"] == TASK.problems[0].gold and record["text"] == TRACE
    assert record["finished_at"] == len(TRACE) and record["tokens"] == len(TRACE) + 1
    assert record["correct"] is True and (record["task"], record["id"]) == ("traces", "validation/0/0")
    record = made("a=1;#3garbage#4", finished=False)
    assert (record["answer"], record["finished_at"], record["tokens"]) == ("3", 6, 15)
    for text in ("a=1;", "a=1;" + ANSWER_MARK, "#x3"):
        assert made(text)["answer"] is None and made(text)["finished_at"] is None


def test_padding_written_by_the_model_does_not_shift_the_place_of_the_answer():
    tokens = [TOKENIZER.pad_token_id] * 2 + TOKENIZER("a#3")["input_ids"]
    record = make_record(Chain(0, 0, tokens, True, 9, 7.0, [9.0], [0.0]), TASK, DMS, TOKENIZER, CONFIG)
    assert record["finished_at"] == 5 and record["tokens"] == 6


def test_reader_leaves_a_partial_last_line_and_the_writer_cuts_it(model, tmp_path):
    sample(model, tmp_path)
    (file,) = tmp_path.iterdir()
    cut = file.read_bytes() + b'{"problem": 9'
    file.write_bytes(cut)
    assert len(read_jsonl(file)) == 6 and file.read_bytes() == cut
    sample(model, tmp_path)
    assert file.read_bytes() == cut[: cut.rindex(b"\n") + 1]


def test_number_of_chains_is_checked(model, tmp_path):
    with pytest.raises(ValueError, match="chains 0: must be >= 1"):
        sample(model, tmp_path, chains=0)


@pytest.mark.parametrize("text", ["0/4", "5/4", "1/0", "1", "1/4/2", "a/b", "-1/4"])
def test_a_shard_is_i_of_n(text):
    with pytest.raises(ValueError, match=r"must be I/N with I in 1\.\.N"):
        Shard.parse(text)


def sample_shard(model, out, text, chains=3, method=DMS):
    file = out / records_file(model, "weights", TOKENIZER, TASK, method, CONFIG, None)
    return sample_records(model, TOKENIZER, TASK, method, chains, CONFIG, file, shard=Shard.parse(text))


def lines(out) -> list[str]:
    """Of all files, sorted."""
    return sorted(line for file in out.iterdir() for line in file.read_text().splitlines())


@pytest.mark.parametrize("count", [2, 4, 20])
def test_shards_together_write_the_records_of_one_process(model, tmp_path, monkeypatch, count):
    whole = sample(model, tmp_path / "whole", chains=3)
    calls = count_jobs(monkeypatch)
    parts = [sample_shard(model, tmp_path / "cut", f"{i}/{count}") for i in range(1, count + 1)]
    assert sorted(map(len, calls)) == sorted(map(len, parts)) and sum(map(len, calls)) == 9
    assert max(map(len, calls)) - min(map(len, calls)) <= 1
    assert lines(tmp_path / "cut") == lines(tmp_path / "whole")
    assert sample(model, tmp_path / "cut", chains=3) == whole and calls[-1] == []  # what shards wrote counts


def test_a_lost_shard_is_repeated_and_the_others_are_left_alone(model, tmp_path, monkeypatch):
    sample(model, tmp_path / "whole", chains=3)
    for text in ("1/3", "2/3", "3/3"):
        sample_shard(model, tmp_path / "cut", text)
    (lost,) = (tmp_path / "cut").glob("*.2-of-3.jsonl")
    lost.write_text(lost.read_text()[:-20])  # it was killed within its last line
    calls = count_jobs(monkeypatch)
    for text in ("1/3", "2/3", "3/3"):
        sample_shard(model, tmp_path / "cut", text)
    assert list(map(len, calls)) == [0, 1, 0]
    assert lines(tmp_path / "cut") == lines(tmp_path / "whole")


def test_another_number_of_shards_goes_on_with_what_is_there(model, tmp_path, monkeypatch):
    sample(model, tmp_path / "whole", chains=3)
    sample_shard(model, tmp_path / "cut", "2/3")
    calls = count_jobs(monkeypatch)
    for text in ("1/2", "2/2"):
        sample_shard(model, tmp_path / "cut", text)
    assert sum(map(len, calls)) == 6
    assert lines(tmp_path / "cut") == lines(tmp_path / "whole")


@pytest.mark.parametrize("written, begun", [("1/2", "1/2"), ("1/2", "1/3"), ("1/2", "1/1"), ("1/1", "2/2")])
def test_a_process_whose_chains_another_one_samples_is_refused(model, tmp_path, written, begun):
    (tmp_path / "x").mkdir()
    whole = tmp_path / "x" / records_file(model, "weights", TOKENIZER, TASK, DMS, CONFIG, None)
    with JsonlWriter(Shard.parse(written).file(whole)), pytest.raises(ValueError, match="another process is writing"):
        sample_shard(model, tmp_path / "x", begun)
    assert not any(file.read_text() for file in (tmp_path / "x").iterdir())
    assert sample_shard(model, tmp_path / "x", begun)


def test_shards_of_one_number_may_write_at_once(model, tmp_path):
    whole = tmp_path / records_file(model, "weights", TOKENIZER, TASK, DMS, CONFIG, None)
    with JsonlWriter(Shard(1, 2).file(whole)):
        assert len(sample_shard(model, tmp_path, "2/2")) == 4


@pytest.mark.slow
def test_processes_of_torchrun_split_the_model_and_write_the_records_of_one(tmp_path, capsys):
    """One of two shards too; the first process alone writes and speaks."""
    model = ["--model", str(ROOT / "data/reasoner/dms-cr8"), "--task", "traces", "--limit", "2", "--method", "dms"]
    words = ["sample", *model, "--chains", "2", "--length", "96", "--json", "--out"]
    split = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "companion.cli.main"]
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'kernels'}", "OMP_NUM_THREADS": "1"}

    def run(*more: str) -> list[dict]:
        assert main([*words, *more]) == 0
        return [json.loads(line) for line in capsys.readouterr().out.splitlines()]

    (alone,) = run(str(tmp_path / "one"))
    command = [sys.executable, *split, *words, str(tmp_path / "two"), "--shard", "1/2"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    (part,) = [json.loads(line) for line in done.stdout.splitlines()]
    (rest,) = run(str(tmp_path / "two"), "--shard", "2/2")
    assert (alone["records"], part["records"], rest["records"]) == (4, 2, 2)
    assert lines(tmp_path / "one" / "records") == lines(tmp_path / "two" / "records")
    names = [json.loads((tmp_path / out / "run.json").read_text()) for out in ("one", "two")]
    assert names[0] == names[1]
