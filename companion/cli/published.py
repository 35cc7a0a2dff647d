"""``dms published`` and ``dms ledger``: the paper's tables and claims beside what a run has measured."""

import json
from pathlib import Path

from companion.paths import RESULTS, RUNS

HELP = """\
  dms published --json     {"run": {"label", "model", "task", "same"}, "margins": [the published row, "measured":
                           {"log2", "linear": {"value", "low", "high"}} or null, "direction"}], "accuracies": [the
                           published row, "measured": {"accuracy", "low", "high", "L", "difference"} or null]}
  dms ledger --json        {"claims": [{"claim", "where", "measured", "published", "verdict", "needs"}], all text}
"""


def add_commands(add) -> None:
    """``add(name, run, text)`` makes a command with --json."""
    command = add("published", run_published, "a run's margins and accuracies beside the paper's tables, as Markdown")
    command.add_argument("--results", type=Path, metavar="DIR",
                         help="directory with curves.json (default: runs/tiny, else data/results/tiny)")  # fmt: skip
    command.add_argument("--model", help="the run's model as data/published names it (default: what curves.json says)")
    command.add_argument("--task", help="its benchmark, likewise")
    command.add_argument("--markdown", type=Path, metavar="FILE", help="write the Markdown to this file")
    command.add_argument("--figure", type=Path, metavar="FILE", help="also draw it to this PNG or SVG file")
    command = add("ledger", run_ledger, "the paper's claims, one a row, with what was measured and a verdict")
    command.add_argument("--runs", type=Path, default=RUNS, metavar="DIR",
                         help="as given to dms reproduce; the run must be finished")  # fmt: skip
    command.add_argument("--profile", default="tiny", help="smoke or tiny (default: tiny)")


def run_published(args) -> dict:
    from companion.claims.published import compare, markdown

    candidates = [args.results] if args.results else [RUNS / "tiny", RESULTS / "tiny"]
    file = next((path / "curves.json" for path in candidates if (path / "curves.json").exists()), None)
    if file is None:
        raise ValueError(f"{candidates[0]}: holds no curves.json; dms reproduce and dms summarise write one")
    summary = json.loads(file.read_text())
    result = compare(summary, args.model, args.task)
    text = markdown(result)
    if args.markdown:
        args.markdown.write_text(text)
    elif not args.json:
        print(text)
    if args.figure:
        draw(summary, args)
    return result


def run_ledger(args) -> dict:
    from dataclasses import asdict

    from companion.claims.ledger import gather, make_ledger, markdown
    from companion.experiments.main import Pipeline
    from companion.experiments.profiles import get_profile

    profile = get_profile(args.profile)
    directory = args.runs / profile.name
    if not (directory / "curves.json").exists():
        raise ValueError(f"{directory}: holds no finished run; dms reproduce --profile {profile.name} makes one")
    claims = make_ledger(gather(Pipeline(profile, directory), RESULTS))
    if not args.json:
        print(markdown(claims))
    return {"claims": [asdict(claim) for claim in claims]}


def draw(summary: dict, args) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from companion.claims.published_plot import plot_comparison
    from companion.figures.style import set_style

    set_style()
    plot_comparison(summary, args.model, args.task).savefig(args.figure)
