"""Faults while chains are sampled and notebooks executed, and hostile data."""

import json
import os
import re
import select
import signal
import time
from functools import partial
from pathlib import Path
from unittest import mock

import nbformat
import pytest
from faulty import FAULTS, HOSTILE, Fault, error_of, fault, small_disk
from forks import die, end, fork, in_child, killed

from companion.book import execute
from companion.method import Method
from companion.records import records_file, sample_records
from companion.tasks import get_task
from companion.tasks.embedded import Traces
from companion.tasks.math import equal
from companion.tasks.reasoner import make_tokenizer
from dms_core.sampling import SamplingConfig
from dms_core.storage import JsonlWriter, read_jsonl
from dms_core.train.data import prepare

TOKENIZER = make_tokenizer()
TASK = Traces(size=3, split="validation", variables=(1, 3))
SAMPLING = SamplingConfig(max_new_tokens=24, temperature=1.0, top_p=1.0, batch=4, stride=8)
LINES = {  # of training data
    "a line of training data is malformed": b'{"text": \n',
    "it is a hundred thousand brackets": b"[" * 100_000 + b"\n",
    "it is not UTF-8": b'{"text": "\xff"}\n',
    "it is NUL bytes": b"\0\0\0\0\n",
    "it has other fields": b'{"question": "x"}\n',
    "the file is empty": b"",
}


def sample(make, out: Path, chains=4) -> list[dict]:
    model, method = make(vocabulary=len(TOKENIZER), window=2), Method("dms", 2.0)
    file = out / records_file(model, "weights", TOKENIZER, TASK, method, SAMPLING, None)
    return sample_records(model, TOKENIZER, TASK, method, chains, SAMPLING, file)


def records_of(out: Path) -> Path:
    (file,) = out.glob("*.jsonl")
    return file


@fault("Sampling", "`kill -9` within a line of records", "the next start repeats that chain; same records")
def killed_in_sampling(out, make):
    write = JsonlWriter.write

    def half(self, value):
        if value["problem"] == 1:
            os.write(self.file.fileno(), json.dumps(value).encode()[:40])
            die()
        write(self, value)

    with mock.patch.object(JsonlWriter, "write", half):
        killed(lambda: sample(make, out))
    before = read_jsonl(records_of(out))
    assert before and not records_of(out).read_bytes().endswith(b"\n")
    assert sample(make, out) == sample(make, out / "whole")
    assert read_jsonl(records_of(out))[: len(before)] == before
    return ""


@fault("Sampling", "the disk fills up", "stops after the last whole line; with room again goes on; same records")
def disk_full_in_sampling(out, make):
    expected = sample(make, out / "whole")

    def run():
        with small_disk(out / "run", 4096) as enlarge:
            said = error_of(lambda: sample(make, out / "run"))
            text = records_of(out / "run").read_bytes()
            assert text.endswith(b"\n") and 0 < text.count(b"\n") < len(expected)
            enlarge()
            assert sample(make, out / "run") == expected
            return said

    said = in_child(run)
    return re.sub(r"Errno \d+\] .*?:", "Errno 28] No space left on device:", said).replace(
        records_of(out / "whole").name, "FILE"
    )


@fault("Sampling", "a second process writes the same records", "refused; the first is not disturbed")
def two_writers(out, make):
    with JsonlWriter(out / "records.jsonl") as log:
        log.write({"chain": 0})
        said = in_child(lambda: error_of(lambda: JsonlWriter(out / "records.jsonl").__enter__()))
        log.write({"chain": 1})
    assert read_jsonl(out / "records.jsonl") == [{"chain": 0}, {"chain": 1}]
    return said


@fault("Sampling", "a reader beside the writer", "reads whole lines, as many as there are")
def reader_beside_writer(out, make):
    values = [{"chain": i, "text": "x" * 5000} for i in range(400)]

    def write():
        with JsonlWriter(out / "records.jsonl") as log:
            for value in values:
                log.write(value)

    child, pipe = fork(write)
    seen = set()
    while len(found := read_jsonl(out / "records.jsonl")) < len(values):
        assert found == values[: len(found)]
        seen.add(len(found))
    assert end(child, pipe) == (0, {"value": None}) and len(seen) > 2
    return ""


def notebook(out: Path) -> Path:
    """Says who executes it, and does what its parameter ``then`` says."""
    v4 = nbformat.v4
    cells = [v4.new_code_cell("then = ''", metadata={"tags": ["parameters"]})]
    cells += [v4.new_code_cell(text) for text in ("import os; print(os.getpid())", "exec(then)", "print('whole')")]
    kernel = {"kernelspec": {"name": "python3", "language": "python", "display_name": "Python 3"}}
    nbformat.write(v4.new_notebook(cells=cells, metadata=kernel), out / "a.ipynb")
    return out / "a.ipynb"


@fault(
    "Notebooks", "`kill -9` while one is executed", "no page is made of it, its kernel ends, the next start repeats it"
)
def killed_in_notebook(out, make):
    def run():
        execute(notebook(out), out / "done" / "a.ipynb", {"then": "import time; time.sleep(600)"})

    child, pipe = fork(run)
    running, kernel = out / "done" / "a.running.ipynb", None
    while kernel is None:
        assert not select.select([pipe], [], [], 0.1)[0], end(child, pipe)
        found = re.search(r'"(\d+)\\n"', running.read_text()) if running.exists() else None
        kernel = found and int(found[1])
    os.kill(child, signal.SIGKILL)
    assert end(child, pipe) == (signal.SIGKILL, {})
    deadline = time.monotonic() + 30
    while Path(f"/proc/{kernel}").exists() and "Z" not in Path(f"/proc/{kernel}/stat").read_text().split()[2]:
        assert time.monotonic() < deadline
        time.sleep(0.1)
    assert not (out / "done" / "a.ipynb").exists()
    execute(notebook(out), out / "done" / "a.ipynb", {})
    assert "whole" in (out / "done" / "a.ipynb").read_text() and not running.exists()
    return ""


@fault("Notebooks", "its kernel is killed", "an error; no page is made of it")
def kernel_killed(out, make):
    with pytest.raises(RuntimeError, match="Kernel died") as error:
        execute(notebook(out), out / "done" / "a.ipynb", {"then": "os.kill(os.getpid(), 9)"})
    assert not (out / "done" / "a.ipynb").exists()
    return str(error.value)


def bad_line(line: bytes, out: Path, make) -> str:
    (out / "rows.jsonl").write_bytes(line)
    said = error_of(lambda: prepare(str(out / "rows.jsonl"), TOKENIZER, 64, 10**6, out / "documents"))
    assert not (out / "documents").exists()
    return said.partition(" ({")[0]


for what, line in LINES.items():
    FAULTS[what] = Fault("Data", what, "refused, with file and line" if line else "refused", partial(bad_line, line))


@fault("Data", "a document is 1 MB of text", "cut to the context, and counted")
def line_huge(out, make):
    (out / "rows.jsonl").write_text(json.dumps({"text": "a" * 10**6}) + "\n")
    facts = prepare(str(out / "rows.jsonl"), TOKENIZER, 64, 10**6, out / "documents").facts
    assert (facts["documents"], facts["tokens"], facts["cut"]) == (1, 64, 1)
    assert facts["tokens_cut"] == 10**6 + 1 - 64
    return ""


@fault(
    "Data", "a line of a benchmark is malformed, or its answer has another type", "refused, with file, line and field"
)
def benchmark_lines(out, make):
    for line in filter(None, LINES.values()):
        (out / "aime.jsonl").write_bytes(line)
        assert re.search(r"aime\.jsonl, line 1: ", error_of(lambda: get_task("aime24", out / "aime.jsonl")))
    (out / "aime.jsonl").write_text('{"id": 1, "problem": "x", "answer": null}\n')
    return error_of(lambda: get_task("aime24", out / "aime.jsonl"))


@fault("Answers", "LaTeX asks the grader to run something", "wrong, and nothing runs")
def hostile_latex(out, make):
    assert not any(equal("3", text.format(out / "made")) for text in HOSTILE)
    assert not (out / "made").exists() and equal("3", "3.0")
    return ""


@fault("Answers", "an answer of 1 MB, or with NUL bytes", "wrong in bounded time; the next is graded")
def huge_answers(out, make):
    for text in ("1" * 10**6, "(" * 10**6, "\\frac{" * 170_000, "x+" * 500_000, "3\0", "\0" * 1000, "\ud800"):
        assert not equal("3", text), text[:9]
    assert equal("3", "3.0")
    return ""
