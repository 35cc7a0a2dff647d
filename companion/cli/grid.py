"""``dms grid``: the embedded model's whole grid, training-free baselines included."""

from pathlib import Path

from companion.paths import RUNS

HELP = """\
  dms grid --json          as dms curves, with "seconds": what was not kept from earlier runs is trained and sampled
"""


def add_commands(add) -> None:
    """``add(name, run, text)`` makes a command with --json."""
    from companion.experiments.profiles import PROFILES

    command = add("grid", run_grid, "DMS, the dense model and training-free baselines on the same problems")
    command.add_argument("--profile", choices=sorted(PROFILES), default="tiny")
    command.add_argument("--runs", type=Path, default=RUNS, help="where results are kept and reused")
    command.add_argument("--seed", type=int, default=0)


def run_grid(args) -> dict:
    from companion.experiments.main import Pipeline
    from companion.experiments.profiles import get_profile

    summary = Pipeline(get_profile(args.profile), args.runs / args.profile, seed=args.seed).grid()
    if not args.json:
        largest = max(point["L"] for point in summary["points"])
        line = "{method} CR {cr:g}: {accuracy:.1f} [{low:.1f}, {high:.1f}], reads {reads:.0f}, peak {peak:.0f}"
        for point in summary["points"]:
            if point["L"] == largest and point["W"] == 1:
                print(line.format(**point))
        for row in summary["paired"]:
            print("accuracy {a} - {b}, CR {cr:g}: {difference:+.1f} [{low:+.1f}, {high:+.1f}]".format(**row))
    return summary
