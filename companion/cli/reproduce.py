"""The embedded model: its main job, what came of it beside the paper, and the studies."""

import json
import os
import sys
from pathlib import Path

from companion.cli.app import Device, Profile, Runs, Seed, command, opt
from companion.paths import REASONER, RESULTS, RUNS, checkout
from dms_core.storage import read_json, write_json

REPRODUCE = "Reproduce"
FINISHED = (RUNS / "tiny", RESULTS / "full")  # where curves.json is looked for
SCORE = (
    "avg@{chains:g} {method} CR {cr:g}, L {L}: {accuracy:.1f} %, SE {questions} over questions, {samples} over chains"
)
PAIR = "{task}: accuracy {a} - {b}, CR {cr:g}: {difference:+.1f} [{low:+.1f}, {high:+.1f}]"


@command(REPRODUCE, "reproduce")
def reproduce(
    profile: Profile = "tiny",
    runs: Runs = RUNS,
    seed: Seed = 0,
    fresh: opt(bool, "forget earlier results of this profile first", "--fresh") = False,
    book: opt(bool, "without it: the curves alone, no chapters") = True,
    base: opt(Path, "another model that knows the embedded tasks, with --no-book", metavar="DIR") = REASONER,
    device: Device = None,
):
    """retrofit the embedded model, compute the curves, render the book"""
    import shutil

    from companion.experiments.run import Run
    from companion.side_by_side import prepare

    if book and base != REASONER:
        raise ValueError(f"--base {base}: must be with --no-book, the chapters are of {REASONER.name}")
    root = Run.of(profile, runs, base=base).root
    choose_card(device)
    if book:
        checkout("dms reproduce")
    prepare()
    from companion.book import reproduce

    if fresh and root.exists():
        shutil.rmtree(root)
    result = reproduce(profile, runs, seed, book=book, base=base)
    print(f"{result['seconds']:.0f} s; read {result['book']}", file=sys.stderr)
    return result


def choose_card(device: str | None) -> None:
    """The notebooks' processes, like this one, see no card (cpu), or one alone (cuda:1)."""
    from companion.devices import checked_device

    if device == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    elif device and (number := checked_device(device).partition(":")[2]):
        seen = os.environ.get("CUDA_VISIBLE_DEVICES")
        os.environ["CUDA_VISIBLE_DEVICES"] = seen.split(",")[int(number)] if seen else number


@command(REPRODUCE, "curves")
def curves(
    directories: opt(
        list[Path],
        "runs, of different tasks (default: runs/tiny, else data/results/full)",
        "--results",
        metavar="DIR...",
    ) = (),
    lengths: opt(list[int], "budgets (default: those of the run)", metavar="L...") = None,
    widths: opt(list[int], "numbers of chains (default: the run's)", metavar="W...") = None,
    figure: opt(Path, "also draw the curves to this PNG or SVG file") = None,
    save: opt(Path, "write the summary to this JSON file", metavar="FILE") = None,
):
    """accuracy at each budget, Pareto margins and paired differences"""
    from companion.experiments.summaries import is_exact

    found = next((path for path in FINISHED if (path / "curves.json").exists()), FINISHED[-1])
    summaries = [_summary(directory, lengths, widths) for directory in directories or [found]]
    summary = summaries[0] if len(summaries) == 1 else _together(summaries)
    if save:
        from companion.provenance import describe

        write_json(save, summary | {"environment": describe()})
    if figure:
        from companion.figures.curves import draw_curves

        draw_curves(summary, figure)
    if not is_exact(summary.get("points", ())):
        yield "peak: of these records what is live of a prompt after the prefill counts as shared, all of it"
    rows = sorted(summary.get("pass_at_1", ()), key=lambda row: row["L"])
    longest = {(row.get("task"), row["method"], row["cr"]): row for row in rows}  # the last of each
    yield from map(score_line, longest.values())
    for row in summary["margins"]:
        if row["value"] is not None:
            line = "{task}: margin {a} - {b}, {axis}, {scale}: {value:+.1f} [{low:+.1f}, {high:+.1f}]"
            yield line.format_map({"task": "", **row})
    yield from (PAIR.format_map({"task": "", **row}) for row in summary["paired"])
    return summary


def score_line(row: dict) -> str:
    """avg@k of one method, ratio and length, with the error from drawing questions and the one from drawing chains."""
    errors = {name: row[f"se_{name}"] for name in ("questions", "samples")}
    errors = {name: "—" if error is None else f"{error:.1f}" for name, error in errors.items()}
    return (f"{row['task']}: " if row.get("task") else "") + SCORE.format(**row, **errors)


def _summary(directory: Path, lengths: list[int] | None, widths: list[int] | None) -> dict:
    """A finished run's curves.json; of records, or at other budgets, computed."""
    file = directory / "curves.json"
    if not file.exists() or lengths or widths:
        from companion.experiments.summaries import summarise_directory

        return summarise_directory(directory, lengths, widths)
    summary = read_json(file)
    if not {"points", "margins", "paired"} <= set(summary):
        raise ValueError(f"{file}: must hold points, margins and paired")
    return summary


def _together(summaries: list[dict]) -> dict:
    """What is a list in each of them, one after the other.  Raises ValueError where two are of one task."""
    from companion.experiments.summaries import merged

    tasks = [task for summary in summaries for task in dict.fromkeys(row.get("task") for row in summary["points"])]
    if twice := sorted({task for task in tasks if tasks.count(task) > 1}):
        raise ValueError(f"--results: several directories of {', '.join(map(str, twice))}; must be of different tasks")
    shared = set.intersection(*map(set, summaries))
    return merged({name: s[name] for name in s if name in shared and isinstance(s[name], list)} for s in summaries)


@command(REPRODUCE, "grid")
def grid(profile: Profile = "tiny", runs: Runs = RUNS, seed: Seed = 0, device: Device = None):
    """DMS, the dense model and the controls (training-free and training-light methods) on the same problems"""
    from companion.experiments import controls
    from companion.experiments.run import Run

    summary = controls.grid(Run.of(profile, runs, seed, device))
    line = (
        "{task}: {method} CR {cr:g}, L {L}: {accuracy:.1f} [{low:.1f}, {high:.1f}], reads {reads:.0f}, peak {peak:.0f}"
    )
    yield from (line.format(**point) for point in summary["points"] if point["W"] == 1)
    for row in summary["margins"]:
        if row["a"] == "dms" and row["scale"] == "log2" and row["value"] is not None:
            yield "{task}: margin dms - {b}, {axis}: {value:+.1f} [{low:+.1f}, {high:+.1f}]".format(**row)
    return summary


@command(REPRODUCE, "runtime")
def runtime(
    profile: Profile = "full",
    runs: Runs = RUNS,
    seed: Seed = 0,
    memory: opt(str, "of keys and values, the same for each method") = "8MiB",
    problems: opt(int, "of each task") = 48,
    device: Device = None,
):
    """seconds of generation at equal cache memory, dense against DMS, on this machine"""
    from companion.experiments.run import Run
    from companion.experiments.runtime import parse_bytes, runtime

    size = parse_bytes(memory)
    if problems < 1:
        raise ValueError(f"problems {problems}: must be >= 1")
    result = runtime(Run.of(profile, runs, seed, device), size, problems)
    yield f"{result['machine']}, {memory} of keys and values"
    for task, methods in result["batches"].items():
        yield f"{task}: " + ", ".join(f"{name} {found['batch']} rows" for name, found in methods.items())
    line = "{task}: margin {a} - {b} over log2 seconds {value:+.1f} [{low:+.1f}, {high:+.1f}]"
    for row in result["margins"]:
        if (row["axis"], row["scale"]) == ("seconds", "log2") and row["value"] is not None:
            yield line.format(**row)
    return result


@command(REPRODUCE, "published")
def published(
    directory: opt(
        Path, "directory with curves.json (default: runs/tiny, else data/results/full)", "--results", metavar="DIR"
    ) = None,
    model: opt(str, "the run's model as data/published names it (default: what curves.json says)") = None,
    task: opt(str, "its benchmark, likewise") = None,
    markdown: opt(Path, "write the Markdown to this file", metavar="FILE") = None,
    figure: opt(Path, "also draw it to this PNG or SVG file", metavar="FILE") = None,
):
    """a run's margins and accuracies beside the paper's tables, as Markdown"""
    from companion.claims import published as tables

    candidates = [directory] if directory else FINISHED
    file = next((path / "curves.json" for path in candidates if (path / "curves.json").exists()), None)
    if file is None:
        raise ValueError(f"{candidates[0]}: holds no curves.json; dms reproduce and dms summarise write one")
    summary = read_json(file)
    result = tables.compare(summary, model, task)
    text = tables.markdown(result)
    if markdown:
        markdown.write_text(text)
    else:
        yield text
    if figure:
        from companion.claims.published_plot import draw_comparison

        draw_comparison(summary, model, task, figure)
    return result


@command(REPRODUCE, "ledger")
def ledger(
    runs: opt(Path, "as given to dms reproduce; the run must be finished", metavar="DIR") = RUNS,
    profile: Profile = "tiny",
):
    """the paper's claims, with what was measured and a verdict; without a run of one's own, by stored results"""
    from dataclasses import asdict

    from companion.claims.ledger import gather, make_ledger, markdown
    from companion.experiments.run import Run, profile_facts

    run = Run.of(profile, runs)
    finished = (run.root / "curves.json").exists()
    if not finished and (runs != RUNS or profile == "smoke"):
        raise ValueError(f"{run.root}: holds no finished run; dms reproduce --profile {profile} makes one")
    if finished and read_json(run.root / "curves.json").get("profile") != json.loads(json.dumps(profile_facts(run))):
        raise ValueError(
            f"{run.root}: holds a run with other settings; dms reproduce --profile {profile} makes it anew"
        )
    if not finished:
        print(f"{run.root} holds no finished run: by the stored results", file=sys.stderr)
    claims = make_ledger(gather(run if finished else None, RESULTS))
    yield markdown(claims)
    return {"claims": [asdict(claim) for claim in claims]}


@command("Inspect", "cache-report")
def cache_report(
    cr: opt(float, "compression ratio of the checkpoint (default: as it says, or 8)") = None,
    checkpoint: opt(Path, "a retrofitted model (default: runs/tiny, else data/reasoner)") = None,
    device: Device = None,
):
    """bytes held after one long generation by the embedded model"""
    from companion.devices import checked_device
    from companion.experiments import heldout
    from companion.experiments import main as job
    from companion.experiments.sample import checkpoint_ratio
    from companion.tasks.programs import make_problem
    from companion.tasks.reasoner import load_tokenizer
    from dms_core.checkpoint import load_model

    place = checked_device(device)
    trained = checkpoint_ratio(checkpoint) if checkpoint else None
    if cr and trained and cr != trained:
        raise ValueError(f"cr {cr:g}: {checkpoint} was trained to {trained:g}; leave --cr out")
    cr = cr or trained or 8.0
    if checkpoint is None and (RUNS / "tiny").exists():
        checkpoint = job.checkpoint(job.Run.of("tiny", RUNS), "dms", cr)
        checkpoint = checkpoint if (checkpoint / "dms.json").exists() else None
    checkpoint = checkpoint or REASONER / f"dms-cr{cr:g}"
    if not checkpoint.is_dir():
        stored = ", ".join(sorted(path.name.removeprefix("dms-cr") for path in REASONER.glob("dms-cr*")))
        raise ValueError(f"{checkpoint}: no such directory; --cr must be one of {stored} where --checkpoint names none")
    problems = [make_problem("test", 0, i, (14, 14)) for i in range(200)]
    longest = max(problems, key=lambda p: len(p.prompt) + len(p.trace))
    report = heldout.cache_report(load_model(checkpoint).to(place), load_tokenizer(checkpoint), longest.prompt, cr)
    line = "{tokens} tokens: {bytes_held} of {bytes_dense} bytes held, {ratio_excluding_window:.2f}x smaller outside"
    yield f"{line} the window".format(**report)
    return report
