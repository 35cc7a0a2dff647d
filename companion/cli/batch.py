"""``dms stage``, ``dms notebook``, ``dms chapters`` and ``dms summarise``: single steps for batch runs."""

import json
import shutil
from pathlib import Path

from companion.paths import RUNS, checkout

HELP = """\
  dms stage --json         {"stage", "seconds", "result"}; without a name {"needs": {name: [names]}}
  dms notebook --json      {"notebook", "parameters"}
  dms chapters --json      {"book"}
  dms summarise --json     as dms curves, with "model", "task" and "environment"
"""


def add_commands(add) -> None:
    """``add(name, run, text)`` makes a command with --json."""
    from companion.experiments.profiles import PROFILES

    command = add("stage", run_one_stage, "one stage of the main job, such as records-dms-cr4; no name lists them")
    command.add_argument("name", nargs="?", metavar="NAME")
    command.add_argument("--profile", choices=sorted(PROFILES), default="tiny")
    command.add_argument("--run-dir", type=Path, help="where results are kept and reused (default: runs/PROFILE)")
    command.add_argument("--seed", type=int, default=0)
    command.add_argument(
        "--code", default="", metavar="DIGEST", help="first delete what other sources made of the stage"
    )
    command.add_argument("--out", type=Path, help="also write the result to this JSON file")

    command = add("notebook", run_notebook, "execute a notebook; a parameter that it does not have is an error")
    command.add_argument("notebook", type=Path)
    command.add_argument("out", type=Path)
    command.add_argument("-p", dest="parameters", nargs=2, action="append", default=[], metavar=("KEY", "VALUE"),
                         help="set a parameter; the value is YAML, such as 3, [0, 4] or a word")  # fmt: skip

    command = add("chapters", run_chapters, "render the book from executed notebooks, in a directory of its own")
    command.add_argument("notebooks", type=Path, help="directory of executed notebooks")
    command.add_argument("out", type=Path, help="directory for sources and pages; what it holds is replaced")

    command = add("summarise", run_summarise, "curves.json of sampled chains: points, margins, paired differences")
    command.add_argument("records", type=Path, nargs="+", help="directories (searched throughout) or JSONL files")
    command.add_argument("--lengths", type=int, nargs="+", required=True, help="L, generated tokens")
    command.add_argument("--widths", type=int, nargs="+", required=True, help="W, voting chains")
    command.add_argument("--model", help="noted in the result, for comparisons with published tables")
    command.add_argument("--task", help="noted in the result")
    command.add_argument("--out", type=Path, required=True, help="the JSON file to write")


def run_one_stage(args) -> dict:
    from companion.experiments.main import Pipeline
    from companion.experiments.profiles import get_profile
    from companion.experiments.stages import run_stage, stages

    pipeline = Pipeline(get_profile(args.profile), args.run_dir or RUNS / args.profile, seed=args.seed)
    if args.name is None:
        needs = {name: list(stage.needs) for name, stage in stages(pipeline).items()}
        if not args.json:
            print("\n".join(f"{name:32} {' '.join(needs[name])}".rstrip() for name in needs))
        return {"needs": needs}
    result = run_stage(pipeline, args.name, args.code)
    if args.out:
        write_json(result, args.out)
    if not args.json:
        print(f"{result['stage']}: {result['seconds']} s")
    return result


def run_notebook(args) -> dict:
    import yaml

    from companion.book import execute

    if not args.notebook.exists():
        raise ValueError(f"{args.notebook}: no such notebook")
    parameters = {key: yaml.safe_load(value) for key, value in args.parameters}
    args.out.parent.mkdir(parents=True, exist_ok=True)
    execute(args.notebook, args.out, parameters)
    return {"notebook": str(args.out), "parameters": parameters}


def run_chapters(args) -> dict:
    from companion.bookbuild import build_book

    chapters = sorted(args.notebooks.glob("[0-9]*.ipynb"))
    chapters = [path for path in chapters if not path.name.endswith(".running.ipynb")]
    if not chapters:
        raise ValueError(f"{args.notebooks}: holds no executed notebooks (NN_name.ipynb)")
    held = {path.name for path in args.out.iterdir()} if args.out.exists() else set()
    if held - {"_build"} and "_toc.yml" not in held:
        raise ValueError(f"{args.out}: exists and is no copy of the book; name another directory")
    shutil.rmtree(args.out, ignore_errors=True)
    shutil.copytree(
        checkout("dms chapters") / "book", args.out, ignore=shutil.ignore_patterns("_build", "notebooks", "__pycache__")
    )
    (args.out / "notebooks").mkdir()
    for path in chapters:
        shutil.copy(path, args.out / "notebooks")
    page = build_book(args.out)
    if not args.json:
        print(page)
    return {"book": str(page)}


def run_summarise(args) -> dict:
    from companion.provenance import describe
    from companion.records import read_records
    from companion.tasks import task_class
    from companion.tasks.grading import canonical
    from dms_core.budgets.curves import summarise

    files = [file for path in args.records for file in (sorted(path.rglob("*.jsonl")) if path.is_dir() else [path])]
    if missing := [str(file) for file in files if not file.exists()]:
        raise ValueError(f"no such records: {', '.join(missing)}")
    records = canonical(record for file in files for record in read_records(file))
    tasks = sorted({record.get("task", "programs") for record in records})
    if len(tasks) > 1:
        raise ValueError(f"records of {len(tasks)} tasks, {', '.join(tasks)}: must be of one")
    summary = summarise(records, args.lengths, args.widths, aggregate=task_class(tasks[0]).aggregate)
    summary |= {"model": args.model, "task": args.task, "environment": describe()}
    write_json(summary, args.out)
    return summary


def write_json(result: dict, file: Path) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(result, indent=1) + "\n")
