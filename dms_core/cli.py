"""``dms``: the companion's commands.  Those with --json print one JSON object on the last line of standard output."""

import argparse
import json
import os
import sys
from pathlib import Path

from dms_core import cli_ablate, cli_grid, cli_lm, cli_retrofit
from dms_core.cli_batch import add_batch
from dms_core.cli_eval import HELP as EVAL_HELP
from dms_core.cli_eval import add_eval_arguments, run_eval
from dms_core.cli_kernels import run_bench, run_kernels
from dms_core.cli_published import add_published
from dms_core.cli_tasks import add_commands, summarise_directory
from dms_core.profiles import PROFILES, get_profile

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "data" / "results" / "tiny"
REASONER = ROOT / "data" / "reasoner"


def main(arguments: list[str] | None = None) -> int:
    """Entry point.  Bad input exits with status 2 and one line on standard error."""
    args = make_parser().parse_args(arguments)
    try:
        result = args.run(args)
    except ValueError as error:
        print(f"dms: {error}", file=sys.stderr)
        return 2
    if args.json and not int(os.environ.get("RANK", 0)):  # under torchrun the first process speaks
        print(json.dumps(result))
    return 0 if args.passed(result) else 1


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="dms", description=__doc__, epilog=JSON_HELP,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def add(name: str, run, text: str) -> argparse.ArgumentParser:
        command = commands.add_parser(name, help=text, description=text)
        command.add_argument("--json", action="store_true", help="print the result as JSON, last")
        command.set_defaults(run=run, passed=lambda result: True)
        return command

    command = add("reproduce", run_reproduce, "retrofit the embedded model, compute the curves, render the book")
    command.add_argument("--profile", choices=sorted(PROFILES), default="tiny")
    command.add_argument("--runs", type=Path, default=ROOT / "runs", help="where results are kept and reused")
    command.add_argument("--seed", type=int, default=0)
    command.add_argument("--fresh", action="store_true", help="forget earlier results of this profile first")

    command = add("curves", run_curves, "accuracy at each budget, Pareto margins and paired differences")
    command.add_argument("--results", type=Path, help="a run directory (default: runs/tiny, else data/results/tiny)")
    command.add_argument("--lengths", type=int, nargs="+", metavar="L", help="budgets (default: those of the run)")
    command.add_argument("--widths", type=int, nargs="+", metavar="W", help="numbers of chains (default: the run's)")
    command.add_argument("--figure", type=Path, help="also draw the curves to this PNG or SVG file")

    add_commands(add)

    command = add("cache-report", run_cache_report, "bytes held after one long generation by the embedded model")
    command.add_argument("--cr", type=float, default=8.0, help="compression ratio of the checkpoint")
    command.add_argument("--checkpoint", type=Path, help="a retrofitted model (default: runs/tiny, else data/reasoner)")

    command = add("plan", run_plan, "what decoding a model costs, by the roofline model of the paper's appendix I")
    command.add_argument("--model", required=True, help="a built-in name such as llama-3.1-8b, a directory or a hub id")
    command.add_argument("--batch", type=int, default=1, help="sequences decoded together")
    command.add_argument("--context", type=int, default=8192, help="tokens of each")
    command.add_argument("--cr", type=float, default=1.0, help="compression ratio of the cache")
    command.add_argument("--device", default="h100", help="a100, h100 (default) or h200")

    add_eval_arguments(add("eval", run_eval, "run tasks of lm-evaluation-harness on a retrofitted model"))
    cli_grid.add_commands(add)
    cli_ablate.add_commands(add)
    cli_lm.add_commands(add)
    command = add("retrofit", cli_retrofit.run_retrofit, "teach a model to evict, by a recipe; also under torchrun")
    cli_retrofit.add_arguments(command)

    command = add("bench", run_bench, "time an operation of dms_kernels against what one would use otherwise")
    command.add_argument("kind", metavar="KIND", help="prefill, train, decode or cache")
    command.add_argument("--device", default="cpu", help="cpu (default) or cuda")
    command.add_argument("--case", action="append", metavar="NAME", help="only this case; may be given repeatedly")
    command.add_argument("--repeats", type=int, help="timed rounds (default: what some seconds allow)")
    command.add_argument("--quick", action="store_true", help="tiny shapes, to see that it runs")
    command.add_argument("--save", nargs="?", const="", metavar="FILE",
                         help="merge into data/results/kernels-DEVICE.json, or into FILE")  # fmt: skip

    command = add("kernels", run_kernels, "which implementation serves which device; what the kernels compile to")
    command.add_argument("--aot", action="store_true", help="compile every Triton kernel; needs no card, takes minutes")
    command.add_argument("--target", type=int, nargs="+", metavar="SM", help="80, 90, 100 (default: all three)")
    command.set_defaults(passed=lambda result: all(case["ok"] for case in result.get("cases", [])))

    add_published(add)
    add_batch(add)
    return parser


JSON_HELP = (
    """\
JSON on standard output:
  dms reproduce --json     {"seconds", "retrofit": {"steps", "seconds", "cr_target", "cr_measured", "cr_live"}, "book"}
  dms curves --json        {"points": [{"method", "cr", "L", "W", "problems", "accuracy", "low", "high", "reads",
                           "peak"}], "pass_at_1": [{"method", "cr", "L", "problems", "chains", "accuracy",
                           "se_questions", "se_samples"}],
                           "margins": [{"a", "b", "axis", "scale", "value", "low", "high"}],
                           "paired": [{"a", "b", "cr", "difference", "low", "high"}]}; accuracies and margins in
                           points, 95 % bootstrap intervals over problems, reads and peak in tokens per KV head
  dms sample --json        {"task", "method", "cr", "file", "records", "pass_at_1": as above, or null if not graded}
  dms grade --json         {"task", "files": [{"file", "records", "correct"}]}
  dms cache-report --json  {"cr", "tokens", "window", "bytes_dense", "bytes_held", "bytes_window",
                           "ratio_excluding_window", "live_per_layer_head"}
  dms plan --json          {"model", "batch", "context", "cr", "device", "parameters", "weight_bytes", "kv_bytes",
                           "kv_bytes_per_token", "flops", "read_bytes", "latency_s", "tokens_per_s",
                           "kv_latency_share", "largest_batch", "retrofit_h100_hours"}
  dms fetch --json         {"directory"}
  dms converse --json      {"documents", "tokens", "labelled"}
  dms fidelity --json      {"prompts", "prompt_tokens", "continuation", "rows": [{"method", "cr", "cr_decisions",
                           "cr_live", "agreement", "agreement_low", "agreement_high", "kl", "tokens", "prompts",
                           "needles", "tokens_per_s", "kv_bytes"}], "plain": {"rows", "tokens_per_s", "kv_bytes"},
                           "environment"}; KL in nats a token, bytes of the first batch
  dms retrofit --json      {"out", "steps", "checkpoints": {CR: directory}, "documents": {"rows", "rejected_rows",
                           "documents", "cut", "tokens_cut", "dropped", "tokens", "labelled"}}; with --list
                           {"recipes"}, with --show the recipe's fields
  dms bench --json         {"device", "environment", "cases": [{"name", "kind", "shape", "rounds", "ours_ms",
                           "baseline_ms": {name: ms}, "ratio": {name: baseline over ours}, "quartiles_ms": {"ours":
                           [low, high], name: ...}, "gbps", "copy_gbps", "flops", "peak_bytes": {"ours", name: ...},
                           "notes": {name: why a baseline is missing}}]}; medians; gbps: 10^9 bytes a second that the
                           operation must move, copy_gbps: that a copy moves; peak_bytes: beyond what was held before;
                           "held_bytes" {"ours", name: ...} with cache
  dms kernels --json       {"torch", "triton", "devices": {"cpu", "cuda": {"name", "modules": {operation: module} or
                           null, "why": reason or null}}}
  dms kernels --aot --json {"triton", "cases": [{"kernel", "target", "registers", "spills", "shared", "limit", "stack",
                           "ok"}]}, shared, its limit and stack in bytes; status 1 if a case is not ok
  dms published --json     {"run": {"label", "model", "task", "same"}, "margins": [the published row, "measured":
                           {"log2", "linear": {"value", "low", "high"}} or null, "direction"}], "accuracies": [the
                           published row, "measured": {"accuracy", "low", "high", "L", "difference"} or null]}
  dms stage --json         {"stage", "seconds", "result"}; without a name {"needs": {name: [names]}}
  dms notebook --json      {"notebook", "parameters"}
  dms chapters --json      {"book"}
  dms summarise --json     as dms curves, with "model", "task" and "environment"
"""
    + EVAL_HELP
    + cli_grid.HELP
    + cli_ablate.HELP
)


def run_reproduce(args) -> dict:
    import shutil

    from dms_core.reproduce import reproduce

    if args.fresh:
        shutil.rmtree(args.runs / args.profile, ignore_errors=True)
    result = reproduce(args.profile, args.runs, args.seed)
    print(f"{result['seconds']:.0f} s; read {result['book']}", file=sys.stderr)
    return result


def run_curves(args) -> dict:
    """The stored summary of a run directory, or one computed from its records."""
    run_tiny = ROOT / "runs" / "tiny"
    directory = args.results or (run_tiny if (run_tiny / "curves.json").exists() else RESULTS)
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

    from dms_core import report

    report.set_style()
    fig, axes = plt.subplots(1, 2, figsize=(12, 4.5), layout="constrained", sharey=True)
    for axis, ax in zip(("reads", "peak"), axes, strict=True):
        report.plot_curves(summary, axis, ax)
    fig.savefig(file, dpi=120)


def run_plan(args) -> dict:
    from dms_core.planner import lines, plan

    result = plan(args.model, args.batch, args.context, args.cr, args.device)
    if not args.json:
        print("\n".join(lines(result)))
    return result


def run_cache_report(args) -> dict:
    from dms_core.checkpoint import load_model
    from dms_core.measure import cache_report
    from dms_core.pipeline import Pipeline
    from dms_core.tasks.programs import make_problem
    from dms_core.tasks.reasoner import load_tokenizer

    profile = get_profile("tiny")
    checkpoint = args.checkpoint
    if checkpoint is None:
        trained = ROOT / "runs" / "tiny"
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


if __name__ == "__main__":
    sys.exit(main())
