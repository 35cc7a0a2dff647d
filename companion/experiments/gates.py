"""The paper's gate under the main job's whole recipe: a query neuron beside the adapter and the dense model.

``python -m companion.experiments.gates`` retrofits what the profile's run directory lacks and writes
data/results/gates.json.  The ablation ``neuron`` asks with short retrofits and several seeds what such a gate needs;
this asks how far it gets when it has all of that and time.  A stopped run goes on where it was.
"""

import argparse
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np

from companion.experiments import main as job
from companion.experiments.ablations import HELD, difference, interval, shares
from companion.experiments.profiles import PROFILE_NAMES
from companion.method import Method
from companion.paths import RESULTS, RUNS
from companion.provenance import describe
from dms_core.storage import write_json

NEURON = {"dms": {"gate": "neuron"}, "retrofit": {"neuron_warmup": 60, "neuron_zero": True}}
PAIRS = (("neuron", "vanilla"), ("dms", "vanilla"), ("neuron", "dms"))


def open_gates(profile: str, runs: Path, seed: int = 0, device: str | None = None) -> job.Run:
    """The main job's run with one more variant, so that what the main job has computed is used."""
    run = job.Run.of(profile, runs, seed, device)
    return replace(run, variants=run.variants | {"neuron": run.variants["dms"].changed("neuron", **NEURON)})


def compare_gates(run: job.Run, report: Callable[[str], None] = print) -> dict:
    """``rows``: accuracy of one chain at the largest L and what was held out, a task, gate and ratio each; ``pairs``:
    differences in points with 95 % intervals over problems and, with several, retrofit seeds."""
    rows, pairs = [], []
    for one in run.all_tasks:
        dense = shares(job.records(one, Method("vanilla", 1.0)), one.profile)
        for cr in run.profile.crs:
            right = {"vanilla": np.array([dense] * run.profile.seeds)}
            for name in ("dms", "neuron"):
                methods = [Method(name, cr, seed) for seed in range(run.profile.seeds)]
                right[name] = np.array([shares(job.records(one, method), one.profile) for method in methods])
                held = [job.held_out(run, name, cr, method.seed) for method in methods]
                facts = {key: float(np.mean([facts[key] for facts in held])) for key in HELD}
                rows.append({"task": one.task.name, "gate": name, "cr": cr, **interval(right[name]), **facts})
                report("{task}, {gate}, CR {cr:g}: {mean:.1f} %, {cr_decisions:.2f} by decisions".format(**rows[-1]))
            of = {"task": one.task.name, "cr": cr}
            pairs += [of | difference(a, b, right[a] - right[b]) for a, b in PAIRS]
    recipes = {name: run.variants[name].to_dict() for name in ("dms", "neuron")}
    return {"rows": rows, "pairs": pairs, "recipes": recipes, "environment": describe()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--profile", choices=PROFILE_NAMES, default="tiny")
    parser.add_argument("--runs", type=Path, default=RUNS, help="where retrofits are kept, a directory a profile")
    parser.add_argument("--out", type=Path, default=RESULTS / "gates.json")
    parser.add_argument("--device", help="cpu or cuda (default: cuda where there is one)")
    given = parser.parse_args()
    write_json(given.out, compare_gates(open_gates(given.profile, given.runs, device=given.device)))


if __name__ == "__main__":
    main()
