"""Chains of one model and method on a benchmark in a directory of their own, and the curves of what such runs wrote.

The directory holds ``records/*.jsonl``, one file a (method, CR) and shard, and ``run.json``: the task, the lengths and
widths to report, and for each method its file and the arguments of the chat template.
"""

import inspect
import math
import sys
from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch

from companion.experiments.profiles import get_profile
from companion.method import Method
from companion.records import WHOLE, Shard, record_files, records_file, sample_records
from companion.tasks import Task, get_task, task_class
from companion.tasks.embedded import EMBEDDED
from companion.tasks.grading import canonical, grade_file
from companion.tasks.sandbox import sandbox
from dms_core import checkpoint
from dms_core.baselines import BASELINE_NAMES, get_baseline
from dms_core.budgets.curves import summarise
from dms_core.budgets.voting import RECORD_KEYS
from dms_core.chat import check_arguments
from dms_core.checkpoint import fast_dtype, fingerprint, load_base, load_gates, load_model, read_settings
from dms_core.config import DMSConfig
from dms_core.hub_files import local_directory
from dms_core.interop import is_foreign
from dms_core.model import attach
from dms_core.parallel import tensor_parallel
from dms_core.sampling import SamplingConfig
from dms_core.storage import read_json, read_jsonl, write_json

SIDECAR = "run.json"


def load_task(name: str, source: Path | None, limit: int | None, options: dict, unsafe: bool) -> Task:
    """``get_task``; unsafe: run programs without a sandbox, if it is a task that runs any."""
    if unsafe and "unsafe" in inspect.signature(task_class(name)).parameters:
        options = {**options, "unsafe": True}
    return get_task(name, source, limit, **options)


def checked_device(name: str | None = None) -> str:
    """``name``; for None a GPU where there is one.  Raises ValueError for a device that this machine lacks."""
    cards = [f"cuda:{i}" for i in range(torch.cuda.device_count())]
    known = ["cpu", *["cuda"] * bool(cards), *cards]
    if name is not None and name not in known:
        raise ValueError(f"device {name!r}: must be one of {', '.join(known)} on this machine")
    return name or ("cuda" if cards else "cpu")


def checked_dtype(name: str) -> str:
    """Raises ValueError for what is neither "auto" nor a floating dtype of torch."""
    kind = getattr(torch, name, None)
    if name != "auto" and not (isinstance(kind, torch.dtype) and kind.is_floating_point):
        raise ValueError(f"dtype {name!r}: must be auto, float32, bfloat16 or float16")
    return name


def load_dense(name: str, device: str | None = None):
    """A model on ``device`` (see checked_device) in its fast dtype, and its tokenizer, of a directory or hub id."""
    directory, device = local_directory(name), checked_device(device)
    return load_base(directory, dtype=fast_dtype(device)).to(device), load_tokenizer(directory)


def load_tokenizer(name: Path | str):
    """A tokenizer that can pad."""
    tokenizer = checkpoint.load_tokenizer(name)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def sample_benchmark(
    model: str,
    task: Task,
    method: str,
    cr: float | None,
    chains: int,
    config: SamplingConfig,
    out: Path,
    lengths: Sequence[int] = (),
    widths: Sequence[int] = (),
    *,
    gates: str | None = None,
    device: str | None = None,
    dtype: str = "auto",
    workers: int = 1,
    unsafe: bool = False,
    shard: Shard = WHOLE,
) -> dict:
    """Sample chains, or go on where it was interrupted, and grade them.  Under torchrun its processes split the model.

    model: a directory or hub id, retrofitted for the method ``dms`` unless ``gates`` names what to load on it; cr:
    None for what that checkpoint says. lengths, widths: budgets of the curves, noted in run.json (default: up to
    those sampled). workers: programs graded at once. shard: the part of the chains to sample, to a file of its own.
    Returns {"task", "method", "cr", "file", "records", "pass_at_1"} of that part, the last None where nothing is
    graded and in other processes than the first.  Raises ValueError where model, method or ratio are wrong, or
    ``out`` belongs to another task.
    """
    _check(method, cr, gates, lengths=lengths, widths=widths, chains=[chains], workers=[workers])
    device, dtype = _process_device(device), checked_dtype(dtype)
    note = _noted(out, task)
    directory, trained = local_directory(model), local_directory(gates or model)
    cr = cr or (checkpoint_ratio(trained) if method == "dms" else 1.0)
    if not cr:
        raise ValueError(f"{gates or model} does not say its compression ratio: give --cr")
    tokenizer = load_tokenizer(directory)
    check_arguments(tokenizer, task.template)
    chosen, longest = Method(method, float(cr)), config.max_new_tokens
    baseline = get_baseline(method)(chosen.cr) if method in BASELINE_NAMES else None
    loaded = _load(directory, trained if method == "dms" else None, device, dtype)
    first = loaded.dms.split.rank == 0
    weights = "".join(map(fingerprint, dict.fromkeys([directory, trained])))
    whole = out / "records" / records_file(loaded, weights, tokenizer, task, chosen, config, baseline)
    if first:
        lengths = list(lengths) or sorted({max(1, longest // 4), max(1, longest // 2), longest})
        widths = list(widths) or [w for w in (1, 2, 4, 8, 16, 32) if w <= chains]
        write_json(out / SIDECAR, _with_records(note, task, chosen, whole.name, lengths, widths))
    file = shard.file(whole)
    records = sample_records(loaded, tokenizer, task, chosen, chains, config, whole, baseline, shard)
    if task.grades_later and first:
        records = _graded(records, task, file, [file] if shard.count > 1 else record_files(whole), workers, unsafe)
    known = [record for record in records if record["correct"] is not None] if first else []
    score = summarise(known, [longest], [1], 1)["pass_at_1"][0] if known else None
    facts = {"task": task.name, "method": method, "cr": chosen.cr, "file": str(file), "records": len(records)}
    return {**facts, "pass_at_1": score}


def _check(method: str, cr: float | None, gates: str | None, **counts: Sequence[int]) -> None:
    """Raises ValueError for what no model is needed to see."""
    if method not in ("vanilla", "dms", *BASELINE_NAMES):
        raise ValueError(f"method {method!r}: must be one of vanilla, dms, {', '.join(sorted(BASELINE_NAMES))}")
    if method in BASELINE_NAMES and cr is None:
        raise ValueError(f"--method {method}: needs --cr, the compression ratio of its budget")
    if cr is not None and not 1 <= cr < math.inf:
        raise ValueError(f"cr {cr}: must be a finite number >= 1")
    if gates and method != "dms":
        raise ValueError(f"gates {gates} with method {method!r}: must be with dms")
    for name, values in counts.items():
        if values and min(values) < 1:
            raise ValueError(f"{name} {', '.join(map(str, values))}: must be >= 1")


def _with_records(note: dict, task: Task, method: Method, name: str, lengths: list[int], widths: list[int]) -> dict:
    """What run.json holds once ``method`` has its file of records."""
    templates = note.get("template", {}) | {str(method): dict(task.template)}
    templates = {key: arguments for key, arguments in templates.items() if arguments}
    records = note["records"] | {str(method): name}
    return note | {"lengths": lengths, "widths": widths, "records": records, "template": templates}


def _graded(records: list[dict], task: Task, file: Path, files: Sequence[Path], workers: int, unsafe: bool):
    """The records of ``files``, graded in place; ``records`` as they are where programs cannot be run."""
    if not unsafe and (reason := sandbox.why_not()):
        print(f"not graded: {reason}; grade with dms grade {file} --task {task.name}", file=sys.stderr)
        return records
    return [record for part in files for record in grade_file(part, task, workers, missing=True)]


def _process_device(name: str | None) -> str | None:
    """``checked_device``, or "auto"; None under torchrun, where each process takes the device of its rank."""
    if not tensor_parallel():
        return name if name == "auto" else checked_device(name)
    if name is not None:
        raise ValueError(f"device {name!r}: must be left out under torchrun")
    return None


def _load(directory: Path, trained: Path | None, device: str | None, dtype: str):
    """The model with gates: those of ``trained``, which may be the model itself, or silent ones.

    device: None for the part of this process, "auto" for layers spread over the cards.
    """
    spread = {"device_map": "auto"} if device == "auto" else tensor_parallel()
    options = {"dtype": dtype, **spread}
    if trained == directory:
        model = load_model(directory, **options)
    else:
        base = load_base(directory, **options)
        model = load_gates(base, trained) if trained else attach(base, DMSConfig())
    return model if spread else model.to(device)


def checkpoint_ratio(directory: Path) -> float | None:
    """The compression ratio that a retrofitted model says it was trained for, ours or the authors'."""
    if is_foreign(directory):
        return read_json(directory / "config.json").get("dms_cr")
    return read_settings(directory).get("cr")


def _noted(out: Path, task: Task) -> dict:
    """What run.json holds.  Raises ValueError where it is of another task."""
    old = read_json(out / SIDECAR) if (out / SIDECAR).exists() else {"task": task.name, "records": {}}
    if old["task"] != task.name:
        raise ValueError(f"{out} holds records of {old['task']!r}: take another directory for {task.name!r}")
    return old


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
        if files:
            return summarise_files(files, lengths or note["lengths"], widths or note["widths"], note["task"])
    by_task: dict[str, list[Path]] = defaultdict(list)
    for file in sorted([*directory.glob("*.jsonl"), *directory.glob("records/**/*.jsonl")]):
        by_task[next(iter(read_jsonl(file)), {}).get("task", EMBEDDED[0])].append(file)
    if not by_task:
        raise ValueError(f"{directory}: no records/*.jsonl for curves; dms reproduce and dms sample write them")
    if unknown := set(by_task) - set(EMBEDDED):
        raise ValueError(f"{directory}: records of {min(unknown)!r} without {SIDECAR}, which would say its budgets")
    plans = {task: get_profile("tiny", task) for task in EMBEDDED if task in by_task}
    return merged(
        summarise_files(by_task[task], lengths or plan.lengths, widths or plan.widths, task)
        for task, plan in plans.items()
    )


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
    that is not there, and for records of several tasks.
    """
    files = [file for path in paths for file in (sorted(path.rglob("*.jsonl")) if path.is_dir() else [path])]
    if missing := [str(file) for file in files if not file.exists()]:
        raise ValueError(f"no such records: {', '.join(missing)}")
    records = canonical(_checked(record, file) for file in files for record in read_jsonl(file))
    tasks = sorted({record.get("task", task) for record in records}) or [task]
    if len(tasks) > 1:
        raise ValueError(f"records of {len(tasks)} tasks, {', '.join(tasks)}: must be of one")
    return summarise(records, list(lengths), list(widths), aggregate=task_class(tasks[0]).aggregate)
