"""``dms sample``, ``dms grade`` and the curves of what they wrote.

A directory of samples holds ``records/*.jsonl``, one file a (method, CR), and ``run.json``: the task, its options, the
lengths and widths to report, and which file belongs to which method.
"""

import json
import sys
from pathlib import Path

from companion.experiments.profiles import get_profile
from dms_core.baselines import BASELINES, get_baseline
from dms_core.budgets.curves import summarise

SIDECAR = "run.json"

HELP = """\
  dms sample --json        {"task", "method", "cr", "file", "records", "pass_at_1": as above, or null if not graded}
  dms grade --json         {"task", "files": [{"file", "records", "correct"}]}
"""


def add_commands(add) -> None:
    """``add(name, run, text)`` makes a command with --json."""
    command = add("sample", run_sample, "chains of a model on a benchmark, graded; goes on where it was interrupted")
    command.add_argument("--model", required=True, help="a directory or a hub id; for dms a retrofitted model")
    add_task_options(command)
    command.add_argument("--method", choices=("vanilla", "dms", *sorted(BASELINES)), required=True,
                         help="vanilla: gates off; training-free methods run the original weights")  # fmt: skip
    command.add_argument("--cr", type=float, help="compression ratio (default: the checkpoint's)")
    command.add_argument("--chains", type=int, default=1, metavar="W", help="chains a problem")
    command.add_argument("--length", type=int, required=True, metavar="L", help="most generated tokens a chain")
    command.add_argument("--out", type=Path, required=True, help="directory for run.json and records/")
    command.add_argument(
        "--lengths", type=int, nargs="+", metavar="L", help="budgets of the curves (default: L/4 .. L)"
    )
    command.add_argument(
        "--widths", type=int, nargs="+", metavar="W", help="widths of the curves (default: 1, 2, 4 ..)"
    )
    command.add_argument("--batch", type=int, default=64, help="rows decoded together")
    command.add_argument("--temperature", type=float, default=0.6)
    command.add_argument("--top-p", type=float, default=0.95)
    command.add_argument("--seed", type=int, default=0)
    command.add_argument("--device", help="cpu or cuda (default: cuda where there is one)")
    command.add_argument("--dtype", default="auto", help="float32, bfloat16, ... (default: as saved)")

    command = add("grade", run_grade, "grade records again, in place")
    command.add_argument("records", type=Path, nargs="+", metavar="RECORDS.jsonl")
    add_task_options(command)
    command.add_argument("--missing", action="store_true", help="only records that were never graded")


def add_task_options(command) -> None:
    command.add_argument("--task", required=True, help="programs, aime24, math500, ..., reasoning_gym:DATASET")
    command.add_argument("--source", type=Path, help="a local JSONL file in place of the hub")
    command.add_argument("--limit", type=int, metavar="N", help="the first N problems only")
    command.add_argument("--option", action="append", default=[], metavar="NAME=VALUE",
                         help="an option of the task, such as seed=1; may be given repeatedly")  # fmt: skip
    command.add_argument("--unsafe-execution", action="store_true",
                         help="where there is no sandbox, run what the model wrote without")  # fmt: skip
    command.add_argument("--workers", type=int, default=1, help="programs graded at once")


def load_task(args):
    """The task of the command line."""
    import inspect

    from companion.tasks import get_task, task_class

    options = dict(_option(text) for text in args.option)
    if args.unsafe_execution and "unsafe" in inspect.signature(task_class(args.task)).parameters:
        options["unsafe"] = True
    return get_task(args.task, args.source, args.limit, **options)


def _option(text: str) -> tuple[str, object]:
    name, mark, value = text.partition("=")
    if not mark:
        raise ValueError(f"--option {text}: must be NAME=VALUE")
    try:
        return name, json.loads(value)
    except ValueError:
        return name, value


def run_sample(args) -> dict:
    from companion.records import Method, grid_file, run_grid
    from companion.tasks.grading import grade_file
    from companion.tasks.sandbox import sandbox
    from dms_core.sampling import SamplingConfig

    task = load_task(args)
    note = read_note(args, task)
    model, tokenizer, cr = load_sampler(args)
    config = SamplingConfig(args.length, args.temperature, args.top_p, args.batch, args.seed)
    method = Method(args.method, cr)
    baseline = get_baseline(args.method)(cr) if args.method in BASELINES else None
    file = grid_file(model, tokenizer, task, method, config, args.out / "records", baseline)
    note["records"][f"{method.name}-cr{cr:g}"] = file.name
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / SIDECAR).write_text(json.dumps(note, indent=1) + "\n")
    records = run_grid(model, tokenizer, task, method, args.chains, config, file, baseline)
    if task.grades_later:
        reason = None if args.unsafe_execution else sandbox.why_not()
        if reason:
            print(f"not graded: {reason}; grade with dms grade {file} --task {task.name}", file=sys.stderr)
        else:
            records = grade_file(file, task, args.workers, missing=True)
    result = {"task": task.name, "method": method.name, "cr": cr, "file": str(file), "records": len(records)}
    graded = [r for r in records if r["correct"] is not None]
    row = summarise(graded, [args.length], [1], 1)["pass_at_1"][0] if graded else None
    if row and not args.json:
        print("{method} CR {cr:g}, L {L}: {accuracy:.1f} % over {problems} problems".format(**row))
    return result | {"pass_at_1": row}


def load_sampler(args):
    """Model with gates, tokenizer and compression ratio of the command line."""
    import torch
    from transformers import AutoTokenizer

    from dms_core.checkpoint import load_base, load_model, read_settings
    from dms_core.config import DMSConfig
    from dms_core.model import attach

    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if args.method in BASELINES and not args.cr:
        raise ValueError(f"--method {args.method}: needs --cr, the compression ratio of its budget")
    if args.method != "dms":
        model, cr = attach(load_base(args.model, dtype=args.dtype), DMSConfig()), args.cr or 1.0
    else:
        cr = args.cr or read_settings(args.model).get("cr")
        if not cr:
            raise ValueError(f"{args.model} does not say its compression ratio: give --cr")
        model = load_model(args.model, dtype=args.dtype)
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return model.to(device), tokenizer, float(cr)


def read_note(args, task) -> dict:
    """What run.json shall hold; ValueError where the directory belongs to another task."""
    lengths = args.lengths or sorted({max(1, args.length // 4), max(1, args.length // 2), args.length})
    widths = args.widths or [w for w in (1, 2, 4, 8, 16, 32) if w <= args.chains]
    note = {"task": task.name, "lengths": lengths, "widths": widths, "records": {}}
    file = args.out / SIDECAR
    if file.exists():
        old = json.loads(file.read_text())
        if old["task"] != task.name:
            raise ValueError(f"{args.out} holds records of {old['task']!r}: take another directory for {task.name!r}")
        note["records"] = old["records"]
    return note


def run_grade(args) -> dict:
    from companion.tasks.grading import grade_file

    task = load_task(args)
    files = []
    for file in args.records:
        if not file.exists():
            raise ValueError(f"{file}: no such file")
        records = grade_file(file, task, args.workers, args.missing)
        files.append({"file": str(file), "records": len(records), "correct": sum(r["correct"] for r in records)})
        if not args.json:
            print("{file}: {correct} of {records} correct".format(**files[-1]))
    return {"task": task.name, "files": files}


def summarise_directory(directory: Path, lengths: list[int] | None, widths: list[int] | None) -> dict:
    """The curves of the records below a directory, at these budgets or those of its run.json.

    Answers that the grader holds equal vote as one.  Records of the embedded model's main job, which have no run.json,
    are summarised at the budgets of the profile tiny.
    """
    from companion.tasks import task_class
    from companion.tasks.grading import canonical

    file = directory / SIDECAR
    if file.exists():
        note = json.loads(file.read_text())
        files = [directory / "records" / name for name in note["records"].values()]
    else:
        profile = get_profile("tiny")
        note = {"task": "programs", "lengths": list(profile.lengths), "widths": list(profile.widths)}
        files = sorted([*directory.glob("*.jsonl"), *directory.glob("records/*.jsonl")])
    if not files:
        raise ValueError(f"{directory}: neither curves.json nor records/*.jsonl; run dms reproduce or dms sample first")
    records = canonical(json.loads(line) for file in files for line in file.read_text().splitlines())
    task = records[0].get("task", note["task"]) if records else note["task"]
    aggregate = task_class(task).aggregate
    return summarise(records, lengths or note["lengths"], widths or note["widths"], aggregate=aggregate)
