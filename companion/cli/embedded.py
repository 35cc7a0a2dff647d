"""``dms reproduce``, ``dms curves``, ``dms cache-report``: the embedded model, its curves and its cache."""

import json
import sys
from pathlib import Path

from companion.cli.tasks import summarise_directory
from companion.experiments.profiles import PROFILES, get_profile
from companion.paths import REASONER, RESULTS, RUNS

HELP = """\
  dms reproduce --json     {"seconds", "retrofit": {"steps", "seconds", "cr_target", "cr_measured", "cr_live"}, "book"}
  dms curves --json        {"points": [{"method", "cr", "L", "W", "problems", "accuracy", "low", "high", "reads",
                           "peak"}], "pass_at_1": [{"method", "cr", "L", "problems", "chains", "accuracy",
                           "se_questions", "se_samples"}],
                           "margins": [{"a", "b", "axis", "scale", "value", "low", "high"}],
                           "paired": [{"a", "b", "cr", "difference", "low", "high"}]}; accuracies and margins in
                           points, 95 % bootstrap intervals over problems, reads and peak in tokens per KV head
  dms cache-report --json  {"cr", "tokens", "window", "bytes_dense", "bytes_held", "bytes_window",
                           "ratio_excluding_window", "live_per_layer_head"}
"""


def add_commands(add) -> None:
    """``add(name, run, text)`` makes a command with --json."""
    command = add("reproduce", run_reproduce, "retrofit the embedded model, compute the curves, render the book")
    command.add_argument("--profile", choices=sorted(PROFILES), default="tiny")
    command.add_argument("--runs", type=Path, default=RUNS, help="where results are kept and reused")
    command.add_argument("--seed", type=int, default=0)
    command.add_argument("--fresh", action="store_true", help="forget earlier results of this profile first")

    command = add("curves", run_curves, "accuracy at each budget, Pareto margins and paired differences")
    command.add_argument("--results", type=Path, help="a run directory (default: runs/tiny, else data/results/tiny)")
    command.add_argument("--lengths", type=int, nargs="+", metavar="L", help="budgets (default: those of the run)")
    command.add_argument("--widths", type=int, nargs="+", metavar="W", help="numbers of chains (default: the run's)")
    command.add_argument("--figure", type=Path, help="also draw the curves to this PNG or SVG file")

    command = add("cache-report", run_cache_report, "bytes held after one long generation by the embedded model")
    command.add_argument("--cr", type=float, default=8.0, help="compression ratio of the checkpoint")
    command.add_argument("--checkpoint", type=Path, help="a retrofitted model (default: runs/tiny, else data/reasoner)")


def run_reproduce(args) -> dict:
    import shutil

    from companion.book import reproduce

    if args.fresh:
        shutil.rmtree(args.runs / args.profile, ignore_errors=True)
    result = reproduce(args.profile, args.runs, args.seed)
    print(f"{result['seconds']:.0f} s; read {result['book']}", file=sys.stderr)
    return result


def run_curves(args) -> dict:
    """The stored summary of a run directory, or one computed from its records."""
    run_tiny = RUNS / "tiny"
    directory = args.results or (run_tiny if (run_tiny / "curves.json").exists() else RESULTS / "tiny")
    stored = directory / "curves.json"
    if stored.exists() and not (args.lengths or args.widths):
        summary = json.loads(stored.read_text())
    else:
        summary = summarise_directory(directory, args.lengths, args.widths)
    if args.figure:
        draw_curves(summary, args.figure)
    if not args.json:
        for row in summary["margins"]:
            if row["value"] is not None:
                print("margin {a} - {b}, {axis}, {scale}: {value:+.1f} [{low:+.1f}, {high:+.1f}]".format(**row))
        for row in summary["paired"]:
            print("accuracy {a} - {b}, CR {cr:g}: {difference:+.1f} [{low:+.1f}, {high:+.1f}]".format(**row))
    return summary


def draw_curves(summary: dict, file: Path) -> None:
    """Accuracy against KV reads and against peak tokens, side by side."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    from companion.figures import style as report

    report.set_style()
    fig, axes = plt.subplots(1, 2, figsize=(12, 4.5), layout="constrained", sharey=True)
    for axis, ax in zip(("reads", "peak"), axes, strict=True):
        report.plot_curves(summary, axis, ax)
    fig.savefig(file, dpi=120)


def run_cache_report(args) -> dict:
    from companion.experiments.heldout import cache_report
    from companion.experiments.main import Pipeline
    from companion.tasks.programs import make_problem
    from companion.tasks.reasoner import load_tokenizer
    from dms_core.checkpoint import load_model

    profile = get_profile("tiny")
    checkpoint = args.checkpoint
    if checkpoint is None:
        trained = RUNS / "tiny"
        if trained.exists():
            checkpoint = Pipeline(profile, trained).checkpoint("dms", args.cr)
        if checkpoint is None or not (checkpoint / "dms.json").exists():
            checkpoint = REASONER / f"dms-cr{args.cr:g}"
    problems = [make_problem("test", 0, i, (14, 14)) for i in range(200)]
    longest = max(problems, key=lambda p: len(p.prompt) + len(p.trace))
    report = cache_report(load_model(checkpoint), load_tokenizer(checkpoint), longest.prompt, args.cr)
    if not args.json:
        print("{tokens} tokens: {bytes_held} of {bytes_dense} bytes held, "
              "{ratio_excluding_window:.2f}x smaller outside the window".format(**report))  # fmt: skip
    return report
