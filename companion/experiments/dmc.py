"""DMC against DMS with the same gate, at equal tokens and at equal ratio: the ablations' trainer, data and problems.

``python -m companion.experiments.dmc`` retrofits each arm to CR 4 with each seed, measures its checkpoints at CR 2, 3
and 4 and writes data/results/dmc.json.  A stopped run goes on where it was, and the first two arms are ablations:

- ``dms``: eviction, adapter gate.
- ``neuron-all``: eviction, a query neuron's gate with a warm-up, a start at zero and a rate of its own.
- ``dmc``: merging, decided by a key neuron and weighted by query neurons, with the same three.
- ``dmc-pressed``: the same with ten times the weight of the compression loss, since ``dmc`` stays far below its target.

At equal tokens the last checkpoints are compared.  Their measured ratios differ, so at equal ratio each arm's accuracy
is taken at the largest measured ratio that both reach with all seeds, linear between its checkpoints and the dense
model at CR 1.
"""

import argparse
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from companion.experiments import main as job
from companion.experiments.ablations import difference, interval, measure, open_ablations, row
from companion.paths import RESULTS, RUNS
from companion.provenance import describe
from companion.tasks.mixture import TraceDataset
from dms_core.baselines.dmc import DMCConfig, attach_dmc, load_dmc
from dms_core.checkpoint import fingerprint, load_base
from dms_core.storage import read_json, update_json, write_json
from dms_core.train.retrofit import retrofit
from dms_core.train.schedule import checkpoint_dir

MERGING = {"dmc": 1.0, "dmc-pressed": 10.0}  # times the reference's weight of the compression loss
ARMS = ("dms", "neuron-all", *MERGING)
PAIRS = (*((a, b) for b in MERGING for a in ("dms", "neuron-all")), ("dms", "neuron-all"))
RATIOS = ("cr_decisions", "cr_live")  # what equal ratio means; the first is the primary one


def open_comparison(root: Path, **options) -> job.Run:
    """The ablations' run (see ``open_ablations``) with DMC's variants, which train as ``neuron-all`` does."""
    run = open_ablations(root, **options)
    like, variants = run.variants["neuron-all"], dict(run.variants)
    config = DMCConfig(scale=like.dms.scale, temperature=like.dms.temperature)
    for name, times in MERGING.items():
        pressed = like.changed(name, retrofit={"aux_weight": times * like.retrofit.aux_weight})
        variants[name] = replace(pressed, dms=config)
    return replace(run, variants=variants)


def merged(run: job.Run, name: str, seed: int, cr: float) -> tuple:
    """Train DMC, unless that was done: seconds, the model at ``cr``, and what tells its weights from others'."""
    recipe, out, began = job.recipe_of(run, name, seed), job.retrofit_dir(run, name, seed), time.time()
    file, training = out / "retrofit.json", recipe.retrofit
    if not file.exists() or "seconds" not in read_json(file):
        data = TraceDataset(run.tokenizer, training.steps * training.batch, training.batch, seed=training.seed)
        arguments = {"train_sampling_strategy": "sequential", "use_cpu": run.place == "cpu"}
        retrofit(load_base(run.base), run.tokenizer, data, recipe.dms, training, out, attach=attach_dmc, **arguments)
        update_json(file, seconds=time.time() - began)
    directory = checkpoint_dir(out, cr)
    return read_json(file)["seconds"], load_dmc(directory).to(run.place), fingerprint(directory)


def compare_dmc(run: job.Run, report: Callable[[str], None] = print) -> dict:
    """Every arm's checkpoints over all seeds of the profile, ready for JSON.

    ``rows``: of an arm's checkpoint each, as in the ablations; ``pairs``: accuracy of a minus that of b in points, with
    intervals as there, ``at`` "equal tokens", "equal cr_decisions" or "equal cr_live", the latter at the ratio ``cr``.
    """
    seeds, saved = range(run.profile.seeds), job.saved_ratios(run)
    dense, facts = measure(run, "vanilla"), {}
    for seed in seeds:
        for arm in ARMS:
            for cr in saved:
                made = measure(run, arm, seed, cr, merged if arm in MERGING else None)
                facts.setdefault((arm, cr), []).append(made)
                line = "{cr_decisions:.2f} by decisions, {cr_live:.2f} live, KL {kl:.4f}".format(**made["held_out"])
                report(f"{arm} CR {cr:g}, seed {seed}: {line}, accuracy {100 * np.mean(made['right']):.1f} %")
    pairs = []
    for a, b in PAIRS:
        last = [np.array([one["right"] for one in facts[arm, saved[-1]]]) for arm in (a, b)]
        pairs.append({"at": "equal tokens", **difference(a, b, last[0] - last[1])})
        for ratio in RATIOS:
            curves = [[_curve(ratio, dense, [facts[arm, cr][s] for cr in saved]) for s in seeds] for arm in (a, b)]
            cr = min(max(ratios) for curve in curves for ratios, _ in curve)
            first, second = (np.array([at_ratio(*of_seed, cr) for of_seed in curve]) for curve in curves)
            accuracies = {f"accuracy_{side}": interval(x)["mean"] for side, x in (("a", first), ("b", second))}
            pairs.append({"at": f"equal {ratio}", "cr": cr, **difference(a, b, first - second), **accuracies})
    rows = [row(run, arm, facts[arm, cr], cr) for arm in ARMS for cr in saved]
    rows.insert(0, row(run, "vanilla", [dense]))
    recipes = {arm: run.variants[arm].to_dict() for arm in ARMS}
    return {"recipes": recipes, "rows": rows, "pairs": pairs, "environment": describe()}


def _curve(ratio: str, dense: dict, facts: Sequence[dict]) -> tuple[list[float], list[list[float]]]:
    """Measured ratios of a seed's checkpoints and shares right a problem (points, P), the dense model's at 1 first."""
    return [1.0, *(one["held_out"][ratio] for one in facts)], [dense["right"], *(one["right"] for one in facts)]


def at_ratio(ratios: Sequence[float], shares: Sequence[Sequence[float]], cr: float) -> np.ndarray:
    """Shares a problem (P,) at ``cr``, linear between the measured ones: ratios (N,) in any order, shares (N, P)."""
    order = np.argsort(ratios)
    return np.array([np.interp(cr, np.array(ratios)[order], column) for column in np.array(shares)[order].T])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=3, help="retrofits of each arm")
    parser.add_argument("--runs", type=Path, default=RUNS / "ablations", help="where retrofits are kept")
    parser.add_argument("--out", type=Path, default=RESULTS / "dmc.json")
    parser.add_argument("--device", help="cpu or cuda (default: cuda where there is one)")
    given = parser.parse_args()
    write_json(given.out, compare_dmc(open_comparison(given.runs, seeds=given.seeds, device=given.device)))


if __name__ == "__main__":
    main()
