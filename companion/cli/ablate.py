"""``dms ablate``: ablations of the embedded model's retrofit, and what the delay is used for."""

import json
from pathlib import Path

from companion.paths import RESULTS, RUNS

HELP = """\
  dms ablate NAME --json   {"question", "reference", "recipe", "rows": [{"variant", "eviction", "window", "gate",
                           "train", "loss", "cr", "steps", "cr_decisions", "cr_live", "kl", "agreement", "accuracy",
                           "low", "high", "problems", "chains", "L", "tokens", "seconds"}], "pairs": [{"a", "b",
                           "difference", "low", "high", "problems"}], "missing", "left_out", "environment"}
  dms ablate seeds --json  {"rows": [{"method", "seed", "cr", "cr_decisions", "cr_live", "kl", "agreement", "seconds",
                           "accuracy", "difference"}], "means": [{"a", "b", "cr", "difference", "seeds"}], "dense":
                           {"accuracy"}, each with low and high, "seeds", "problems", "chains", "L", "recipe", "dms",
                           "environment"}
  dms ablate delay --json  {"question", "rows": [{"model", "patched", "kind", "lookups", "follows", "effect"}],
                           "dms_minus_dense": [{"patched", "kind", "difference"}], "window_minus_control":
                           {"difference"}, each with NAME_low and NAME_high, in %; "source_kept": [[share a KV head] a
                           layer], "kept_somewhere", "verdict", "settings", "environment"}
"""


def add_commands(add) -> None:
    """``add(name, run, text)`` makes a command with --json."""
    command = add("ablate", run_ablate, "what a part of the method is worth: retrofits that differ in one thing")
    command.add_argument(
        "name",
        metavar="NAME",
        help="window, steps, loss or weights; seeds: the main job's retrofit again; delay: an intervention",
    )
    command.add_argument(
        "--runs", type=Path, help="where retrofits are kept (default: runs/ablations; seeds: runs/tiny)"
    )
    command.add_argument("--finished", action="store_true", help="only what was measured before; train nothing")
    command.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="of seeds (default: 0 1 2)")
    command.add_argument("--profile", default="tiny", help="of seeds: smoke or tiny (default: tiny)")
    command.add_argument("--documents", type=int, default=200, help="of delay: validation documents (default: 200)")
    command.add_argument("--save", action="store_true", help="also store the result in data/results")


def run_ablate(args) -> dict:
    if args.finished and args.name in ("delay", "seeds"):
        raise ValueError(f"--finished with {args.name}: must be an ablation by short retrofits")
    return {"delay": run_delay, "seeds": run_seeds}.get(args.name, run_ablation)(args)


def run_ablation(args) -> dict:
    from transformers.utils import logging

    from companion.experiments.ablations import Ablations, get_ablation

    get_ablation(args.name)  # before anything is loaded
    logging.disable_progress_bar()
    result = Ablations(args.runs or RUNS / "ablations").result(args.name, args.finished)
    if args.save:
        save(RESULTS / "ablations.json", {args.name: result})
    if not args.json:
        line = ("{variant}: KL {kl:.4f}, agreement {agreement:.4f}, CR {cr_decisions:.2f} by decisions, {cr_live:.2f} "
                "live, accuracy {accuracy:.1f} [{low:.1f}, {high:.1f}]")  # fmt: skip
        for row in result["rows"]:
            print(line.format(**row))
        for row in result["pairs"]:
            print("accuracy {a} - {b}: {difference:+.1f} [{low:+.1f}, {high:+.1f}]".format(**row))
        for variant in result["missing"]:
            print(f"{variant}: not finished")
    return result


def run_seeds(args) -> dict:
    from transformers.utils import logging

    from companion.experiments.profiles import get_profile
    from companion.experiments.seeds import Replicas

    logging.disable_progress_bar()
    profile = get_profile(args.profile)
    result = Replicas(profile, args.runs or RUNS / profile.name, args.seeds).result()
    if args.save:
        (RESULTS / profile.name / "seeds.json").write_text(json.dumps(result, indent=1) + "\n")
    if not args.json:
        line = ("{method} CR {cr:g}, seed {seed}: {accuracy:.1f} %, minus dense {difference:+.1f} [{low:+.1f}, "
                "{high:+.1f}], KL {kl:.4f}, CR {cr_decisions:.2f} by decisions")  # fmt: skip
        for row in result["rows"]:
            print(line.format(**row))
        for row in result["means"]:
            print("mean of {seeds}, {a} - {b}, CR {cr:g}: {difference:+.1f} [{low:+.1f}, {high:+.1f}]".format(**row))
    return result


def run_delay(args) -> dict:
    from companion.experiments.delay import delay

    result = delay(documents=args.documents)
    if args.save:
        (RESULTS / "delay.json").write_text(json.dumps(result, indent=1) + "\n")
    if not args.json:
        line = ("{model}, {patched}: follows the other digit {follows:.1f} % [{follows_low:.1f}, {follows_high:.1f}], "
                "log-odds moved {effect:.3f} [{effect_low:.3f}, {effect_high:.3f}]")  # fmt: skip
        for row in result["rows"]:
            if row["kind"] == "all":
                print(line.format(**row))
        print(result["verdict"])
    return result


def save(file: Path, results: dict) -> None:
    """Replace some entries of a JSON object on disk and keep the others."""
    stored = json.loads(file.read_text()) if file.exists() else {}
    file.write_text(json.dumps({**stored, **results}, indent=1) + "\n")
