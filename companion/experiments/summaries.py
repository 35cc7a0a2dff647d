"""From files of records to curves.  Needs no torch."""

import re
from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path

from companion.experiments.profiles import get_profile
from companion.shards import record_files
from companion.tasks import task_class
from companion.tasks.embedded import EMBEDDED
from companion.tasks.grading import canonical
from dms_core.budgets.curves import summarise
from dms_core.budgets.voting import RECORD_KEYS
from dms_core.storage import read_json, read_jsonl

SIDECAR = "run.json"  # what a directory's records are of
# As records.records_file and shards name them.
NAMED = re.compile(r"(?P<method>.+)-(?P<settings>[0-9a-f]{12})(\.\d+-of-\d+)?\.jsonl")


def summarise_directory(directory: Path, lengths: Sequence[int] | None, widths: Sequence[int] | None) -> dict:
    """The curves of the records in a directory, at these budgets or those of its run.json.

    Records of the embedded model's main job, which have no run.json, are summarised task by task, at the budgets of the
    profile tiny.
    """
    if (directory / SIDECAR).exists():
        note = read_json(directory / SIDECAR)
        if not {"task", "lengths", "widths", "records"} <= set(note):
            raise ValueError(f"{directory / SIDECAR}: must hold task, lengths, widths and records")
        named = [directory / "records" / name for name in note["records"].values()]
        files = [file for whole in named for file in record_files(whole) or [whole]]
        check_limits(lengths or note["lengths"], note.get("limits", {}))
        if files:
            return summarise_files(files, lengths or note["lengths"], widths or note["widths"], note["task"])
    files = sorted([*directory.glob("*.jsonl"), *directory.glob("records/**/*.jsonl")])
    first = {file: next(iter(read_jsonl(file)), {}) for file in files}
    _check_one_kind(first)
    by_task: dict[str, list[Path]] = defaultdict(list)
    for file, record in first.items():
        by_task[record.get("task", EMBEDDED[0])].append(file)
    if not by_task:
        raise ValueError(f"{directory}: no records/*.jsonl for curves; dms reproduce and dms sample write them")
    if unknown := set(by_task) - set(EMBEDDED):
        raise ValueError(f"{directory}: records of {min(unknown)!r} without {SIDECAR}, which would say its budgets")
    plans = {task: get_profile("tiny", task) for task in EMBEDDED if task in by_task}
    return merged(
        summarise_files(by_task[task], lengths or plan.lengths, widths or plan.widths, task)
        for task, plan in plans.items()
    )


def _check_one_kind(first: dict[Path, dict]) -> None:
    """Raises ValueError for files of one method and ratio with other settings: which chains are meant?

    first: the first record of each file.  Where a KV budget is for one length, each length has its file.
    """
    found: dict[tuple, str] = {}
    for file, record in first.items():
        if (name := NAMED.fullmatch(file.name)) and "budget_length" not in record:
            other = found.setdefault((file.parent, name["method"]), name["settings"])
            if other != name["settings"]:
                both = f"{name['method']} with settings {other} and {name['settings']}"
                raise ValueError(f"{file.parent}: holds {both}; must be one, move the other's files elsewhere")


def check_limits(lengths: Sequence[int], limits: dict[str, int]) -> None:
    """Raises ValueError for lengths at which chains of some method, sampled up to its limit, may have been cut off."""
    method = min(limits, key=lambda name: limits[name], default="")
    if method and max(lengths) > limits[method]:
        raise ValueError(f"lengths {max(lengths)}: must be <= {limits[method]}, up to which {method} is sampled here")


def is_exact(points: Sequence[dict]) -> bool:
    """Whether peaks count once what of the prompt is kept for good.

    Older ones count all that is live of it after the prefill.  DMS drops more while its window leaves the prompt, so
    that each chain but the first holds up to w + 1 tokens more than such a peak says.
    """
    return all(point.get("kept") is not None for point in points)


def merged(summaries: Iterable[dict]) -> dict:
    """The lists of several tasks' summaries, one after the other; every row says its task."""
    summaries = list(summaries)
    return {name: [row for part in summaries for row in part[name]] for name in summaries[0]}


def _checked(record: dict, file: Path) -> dict:
    if not isinstance(record, dict) or not set(RECORD_KEYS) <= set(record):
        raise ValueError(f"{file}: holds {str(record)[:60]}, no chain record; each must have {', '.join(RECORD_KEYS)}")
    return record


def summarise_files(paths: Iterable[Path], lengths: Sequence[int], widths: Sequence[int], task: str = "traces") -> dict:
    """The curves of the records in JSONL files, and in those anywhere below directories.

    Answers that the grader holds equal vote as one.  task: of records that do not say it.  Raises ValueError for a file
    that is not there, for records of several tasks, and for lengths beyond those that a run.json says were sampled.
    """
    files = [file for path in paths for file in (sorted(path.rglob("*.jsonl")) if path.is_dir() else [path])]
    if missing := [str(file) for file in files if not file.exists()]:
        raise ValueError(f"no such records: {', '.join(missing)}")
    for place in {file.parent.parent / SIDECAR for file in files if file.parent.name == "records"}:
        check_limits(lengths, read_json(place).get("limits", {}) if place.exists() else {})
    records = canonical(_checked(record, file) for file in files for record in read_jsonl(file))
    tasks = sorted({record.get("task", task) for record in records}) or [task]
    if len(tasks) > 1:
        raise ValueError(f"records of {len(tasks)} tasks, {', '.join(tasks)}: must be of one")
    return summarise(records, list(lengths), list(widths), aggregate=task_class(tasks[0]).aggregate)
