"""Grade records, again or for the first time, and spell equal answers alike before they vote."""

import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from companion.tasks import Task, task_class
from dms_core.storage import JsonlWriter, read_jsonl, write_jsonl

EVERY = 60  # seconds after which verdicts are written


def grade(records: Iterable[dict], task: Task, workers: int = 1, missing: bool = False) -> list[dict]:
    """The records with ``correct`` set by the task's grader; with ``missing`` those alone that have none yet.

    The recorded answer is graded and not extracted anew, since with it goes the place where it was complete.  An
    answer that several chains gave is graded once.  ValueError for a record of another task or of an unknown problem.
    """
    records = list(records)
    return _graded(records, task, dict(_verdicts(records, task, workers, missing)), missing)


def _verdicts(records: list[dict], task: Task, workers: int, missing: bool) -> Iterator[tuple]:
    """((problem's identifier, answer), verdict), one by one."""
    problems = {problem.id: problem for problem in task.problems}
    chosen = [r for r in records if _is_due(r, missing)]
    for record in chosen:
        if (name := record.get("task", task.name)) != task.name:
            raise ValueError(f"a record of task {name!r}; allowed: {task.name!r}")
        if _id(record, task) not in problems:
            raise ValueError(f"a record of problem {record.get('id', record['problem'])!r}, which {task.name} lacks")
    jobs = dict.fromkeys((_id(r, task), r["answer"]) for r in chosen)
    with ThreadPoolExecutor(workers) as pool:
        yield from zip(jobs, pool.map(lambda job: task.grade(job[1], problems[job[0]]), jobs), strict=True)


def _graded(records: list[dict], task: Task, verdicts: dict[tuple, bool | None], missing: bool) -> list[dict]:
    def verdict(record: dict) -> bool | None:
        before = record.get("correct")
        return verdicts.get((_id(record, task), record["answer"]), before) if _is_due(record, missing) else before

    return [{**record, "correct": verdict(record)} for record in records]


def _is_due(record: dict, missing: bool) -> bool:
    return not (missing and record.get("correct") is not None)


def grade_file(file: Path, task: Task, workers: int = 1, missing: bool = False) -> list[dict]:
    """``grade`` the records of a file in place; it is replaced as a whole, each minute and at a failure, too.

    So after an interruption ``missing`` goes on.  Raises ValueError while another process is writing the file.
    """
    verdicts: dict[tuple, bool | None] = {}
    with JsonlWriter(file):
        records = list(read_jsonl(file))
        saved = time.monotonic()
        try:
            for job, verdict in _verdicts(records, task, workers, missing):
                verdicts[job] = verdict
                if time.monotonic() - saved > EVERY:
                    write_jsonl(file, _graded(records, task, verdicts, missing))
                    saved = time.monotonic()
        finally:
            graded = _graded(records, task, verdicts, missing)
            if verdicts:
                write_jsonl(file, graded)
    return graded


def canonical(records: Iterable[dict]) -> list[dict]:
    """The records with one spelling an answer: of those the grader holds equal, the gold or the first one's.

    Records are taken by (method, cr, chain), so that their order does not matter; those without a task are compared as
    they stand.
    """
    records = sorted(records, key=lambda r: (str(r["problem"]), r["method"], r["cr"], r["chain"]))
    spellings: dict[tuple, dict[str, None]] = {}  # of each problem, in the order found

    def spelled(record: dict) -> str | None:
        answer = record["answer"]
        if answer is None or "task" not in record:
            return answer
        if record.get("correct") and record["gold"] is not None:
            return record["gold"]
        same, known = task_class(record["task"]).same, spellings.setdefault((record["task"], record["problem"]), {})
        answer = next((one for one in known if same(one, answer)), answer)
        known[answer] = None
        return answer

    return [{**record, "answer": spelled(record)} for record in records]


def _id(record: dict, task: Task) -> str | None:
    if "id" in record:
        return record["id"]
    place = record["problem"]  # records from before tasks had names: the position among the problems
    return task.problems[place].id if isinstance(place, int) and place < len(task.problems) else None
