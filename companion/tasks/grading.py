"""Grade records, again or for the first time, and spell equal answers alike before they vote."""

from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from companion.tasks import Task, task_class
from dms_core.storage import JsonlWriter, read_jsonl, write_jsonl


def grade(records: Iterable[dict], task: Task, workers: int = 1, missing: bool = False) -> list[dict]:
    """The records with ``correct`` set by the task's grader; with ``missing`` those alone that have none yet.

    The recorded answer is graded and not extracted anew, since with it goes the place where it was complete.  An
    answer that several chains gave is graded once.  ValueError for a record of another task or of an unknown problem.
    """
    records = list(records)
    problems = {problem.id: problem for problem in task.problems}
    chosen = [r for r in records if not (missing and r.get("correct") is not None)]
    for record in chosen:
        if (name := record.get("task", task.name)) != task.name:
            raise ValueError(f"a record of task {name!r}; allowed: {task.name!r}")
        if _id(record, task) not in problems:
            raise ValueError(f"a record of problem {record.get('id', record['problem'])!r}, which {task.name} lacks")
    jobs = dict.fromkeys((_id(r, task), r["answer"]) for r in chosen)
    with ThreadPoolExecutor(workers) as pool:
        verdicts = dict(zip(jobs, pool.map(lambda job: task.grade(job[1], problems[job[0]]), jobs), strict=True))
    new = {id(r): verdicts[_id(r, task), r["answer"]] for r in chosen}
    return [{**r, "correct": new.get(id(r), r.get("correct"))} for r in records]


def grade_file(file: Path, task: Task, workers: int = 1, missing: bool = False) -> list[dict]:
    """``grade`` the records of a file in place; it is replaced as a whole.

    Raises ValueError while another process is writing it.
    """
    with JsonlWriter(file):
        records = grade(read_jsonl(file), task, workers, missing)
        write_jsonl(file, records)
    return records


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
