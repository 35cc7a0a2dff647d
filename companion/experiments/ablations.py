"""Ablations of the method at the embedded scale (paper section 5.3, appendix C): one change at a time.

ablations.yaml lists them.  Every variant starts from the same weights, sees the same documents in the same order and
takes the same number of steps to the same target (but for "steps", which is about their number, and a neuron's warm-up,
which comes before the ramp).  With several seeds each is retrofitted anew with each.  What is finished is kept in the
run directory under a hash of the variant, so variants that several ablations share are trained once.
"""

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import numpy as np
import yaml

from companion.experiments import main as job
from companion.experiments.profiles import Profile, get_profile
from companion.method import Method
from companion.paths import REASONER
from companion.provenance import describe
from companion.tasks.mixture import TraceDataset
from dms_core.baselines.kvzap import attach_scores
from dms_core.budgets import bootstrap
from dms_core.checkpoint import fingerprint, load_base, load_model
from dms_core.storage import read_json, write_json
from dms_core.train.recipe import Recipe

REFERENCE = "dms"  # delayed eviction, w = 16, adapter gate, all weights, forward KL
CR = 4.0
FITTED = 256  # documents that the regression sees
HELD = ("cr_decisions", "cr_live", "kl", "agreement")

Make = Callable[[job.Run, str, int, float], tuple]  # variant, seed, CR: (seconds, model, what tells its weights apart)


@dataclass(frozen=True)
class Ablation:
    """A question, the variants that answer it, and the pairs (a, b) whose accuracies are compared."""

    question: str
    pairs: list[list[str]]
    left_out: dict[str, str] = field(default_factory=dict)  # what was not run, and why

    @property
    def variants(self) -> list[str]:
        return list(dict.fromkeys([REFERENCE, *(name for pair in self.pairs for name in pair)]))


_DATA = yaml.safe_load(Path(__file__).with_name("ablations.yaml").read_text())
ABLATIONS = {name: Ablation(**study) for name, study in _DATA["ablations"].items()}


def get_ablation(name: str) -> Ablation:
    """Raises ValueError for an unknown name."""
    if name not in ABLATIONS:
        raise ValueError(f"ablation {name!r}: must be one of {', '.join(ABLATIONS)}")
    return ABLATIONS[name]


def ablation_profile(seeds: int = 1) -> Profile:
    """200 problems, 2 chains, the longest length, after retrofits of 120 steps."""
    full = get_profile("full")
    short = {"final_cr": CR, "steps_per_unit": 20, "rests": ((CR, 60),)}
    return replace(
        full,
        name="ablations",
        recipe=full.recipe.changed(retrofit=short),
        compare_cr=CR,
        crs=(CR,),
        problems=200,
        chains=2,
        lengths=(max(full.lengths),),
        widths=(1,),
        batch=120,
        held_out=64,
        seeds=seeds,
    )


def make_variants(reference: Recipe) -> dict[str, Recipe]:
    """Every variant by its name: what differs from the reference's gate, and from its training."""
    training = reference.retrofit
    as_long = {"rests": (), "steps_per_unit": math.ceil(training.steps / (training.final_cr - 1))}
    changes = _DATA["variants"] | {"vanilla": {}, "no-rest": {"retrofit": as_long}}
    changes["no-rest-decay"] = {"retrofit": {**as_long, "decay": sum(steps for _, steps in training.rests)}}
    return {name: reference.changed(name, **change) for name, change in changes.items()}


def open_ablations(
    root: Path, profile: Profile | None = None, base: Path = REASONER, seed=0, device=None, seeds=1
) -> job.Run:
    """The run that holds all variants."""
    profile = profile or ablation_profile(seeds)
    variants = make_variants(profile.recipe.changed(retrofit={"seed": seed}))
    return job.Run(profile, root, base, seed, variants, device=device)


# How a variant comes to its weights.


def retrofitted(run: job.Run, name: str, seed: int, cr: float) -> tuple:
    seconds, directory = job.retrofit(run, name, seed)["seconds"], job.checkpoint(run, name, cr, seed)
    return seconds, load_model(directory).to(run.place), fingerprint(directory)


def regressed(run: job.Run, name: str, seed: int, cr: float) -> tuple:
    """The adapter gate's map of the normed stream with another teacher, solved for at once (see kvzap).

    What else differs from an adapter: a bias, and that a token decides about itself.
    """
    began, seed = time.time(), job.recipe_of(run, name, seed).retrofit.seed
    documents = TraceDataset(run.tokenizer, FITTED, 1, "retrofit", seed)
    ids = [documents[i]["input_ids"] for i in range(FITTED)]
    model = attach_scores(load_base(run.base), ids, run.profile.recipe.dms.window, cr)
    return time.time() - began, model.to(run.place), f"{run.base_weights}/{FITTED} documents of seed {seed}"


def dense(run: job.Run, name: str, seed: int, cr: float) -> tuple:
    return 0.0, *job.model_of(run, Method("vanilla", 1.0))


UNTRAINED: dict[str, tuple[str, Make]] = {"gates-future": ("future attention", regressed), "vanilla": ("none", dense)}


# Measures.


def method_of(run: job.Run, name: str, seed: int = 0, cr: float | None = None) -> Method:
    return Method("vanilla", 1.0) if name == "vanilla" else Method(name, cr or run.profile.compare_cr, seed)


def facts_file(run: job.Run, name: str, seed: int = 0, cr: float | None = None) -> Path:
    """Where ``measure`` keeps what it found about a variant."""
    profile, method = run.profile, method_of(run, name, seed, cr)
    what = f"facts-{profile.held_out}-{profile.problems}x{profile.chains}x{max(profile.lengths)}.json"
    return job.checkpoint(run, name, method.cr, seed) / what


def measure(run: job.Run, name: str, seed: int = 0, cr: float | None = None, make: Make | None = None) -> dict:
    """Train a variant and measure it, or read what was measured.

    seed: of the retrofit, counted from the run's; cr: of the checkpoint, the profile's ``compare_cr`` by default.
    Returns ``held_out`` (see ``heldout.held_out``), the training's ``seconds``, ``tokens`` a chain, and ``right``:
    for each test problem the share of its chains with the right answer.
    """
    file, profile, method = facts_file(run, name, seed, cr), run.profile, method_of(run, name, seed, cr)
    if not file.exists():
        make = make or (UNTRAINED[name][1] if name in UNTRAINED else retrofitted)
        seconds, model, weights = make(run, name, seed, method.cr)
        chains = job.sampled(run, method, model, weights, max(profile.lengths))
        facts = {"seconds": seconds, "tokens": float(np.mean([c["tokens"] for c in chains]))}
        write_json(file, {"held_out": job.compared(run, model), **facts, "right": shares(chains, profile).tolist()})
    return read_json(file)


def shares(chains: Sequence[dict], profile: Profile) -> np.ndarray:
    """For each test problem the share of its chain records with the right answer."""
    right = np.bincount([c["problem"] for c in chains], [c["correct"] for c in chains], profile.problems)
    return right / profile.chains


def ablation(name: str, run: job.Run, finished_only: bool = False, report: Callable[[str], None] = print) -> dict:
    """An ablation's table, ready for JSON; with ``finished_only`` nothing is trained or sampled.

    ``rows``: a variant each, means over the profile's seeds; ``pairs``: accuracy of a minus that of b in points over
    the same problems and seeds; with 95 % intervals (see ``interval``) and, with several seeds, the values of each in
    ``by_seed``.  ``missing``: variants that are not finished with all seeds.  report: is told what is finished.
    """
    study = get_ablation(name)
    seeds = {v: range(1 if v == "vanilla" else run.profile.seeds) for v in study.variants}
    done = [v for v in study.variants if not finished_only or all(facts_file(run, v, s).exists() for s in seeds[v])]
    facts: dict[str, list[dict]] = {variant: [] for variant in done}
    for seed in range(run.profile.seeds):  # a seed at a time: an interrupted study is one of fewer seeds
        for variant in (v for v in done if seed in seeds[v]):
            facts[variant].append(measure(run, variant, seed))
            report(f"{variant}, seed {seed}: accuracy {100 * np.mean(facts[variant][-1]['right']):.1f} %")
    recipe = run.profile.recipe.retrofit
    return {
        "question": study.question,
        "reference": REFERENCE,
        "recipe": {"dms": asdict(run.profile.recipe.dms), **asdict(recipe), "steps": recipe.steps, "seed": run.seed},
        "rows": [row(run, variant, facts[variant]) for variant in done],
        "pairs": [pair(a, b, facts) for a, b in study.pairs if a in facts and b in facts],
        "missing": [v for v in study.variants if v not in done],
        "left_out": study.left_out,
        "environment": describe(),
    }


def interval(shares: np.ndarray) -> dict:
    """In points, of shares (seeds, problems): mean, 95 % interval over both as of the main curves, mean of each seed.

    "mean", "low", "high" and, with several seeds, "by_seed".
    """
    means = 100 * bootstrap.means(shares[..., None], 1000, 0)[:, 0]
    found = {"mean": float(means[0]), **dict(zip(("low", "high"), bootstrap.interval(means[1:]), strict=True))}
    by_seed = {str(seed): 100 * float(of_seed.mean()) for seed, of_seed in enumerate(shares)}
    return found | ({"by_seed": by_seed} if len(shares) > 1 else {})


def row(run: job.Run, name: str, facts: Sequence[dict], cr: float | None = None) -> dict:
    """What was measured of a variant, facts of a seed each."""
    dms, recipe, profile = run.variants[name].dms, run.variants[name].retrofit, run.profile
    found = {"variant": name, "eviction": getattr(dms, "eviction", "merging"), "window": dms.window, "gate": dms.gate}
    cr = method_of(run, name, cr=cr).cr
    found |= {"train": recipe.train, "loss": recipe.direction, "cr": cr}
    found |= {"loss": UNTRAINED[name][0], "steps": 0} if name in UNTRAINED else {"steps": recipe.step_of(cr)}
    held = {key: [one["held_out"][key] for one in facts] for key in HELD}
    found |= {key: float(np.mean(values)) for key, values in held.items()}
    accuracy = interval(np.array([one["right"] for one in facts]))
    found |= {"accuracy": accuracy["mean"], "low": accuracy["low"], "high": accuracy["high"], "seeds": len(facts)}
    if len(facts) > 1:
        columns = {"accuracy": accuracy["by_seed"].values(), **held}
        found["by_seed"] = {str(s): {key: list(of)[s] for key, of in columns.items()} for s in range(len(facts))}
    found |= {"documents": facts[0]["held_out"]["documents"], "problems": len(facts[0]["right"])}
    found |= {"chains": profile.chains, "L": max(profile.lengths)}
    tokens, seconds = (float(np.mean([one[key] for one in facts])) for key in ("tokens", "seconds"))
    return found | {"tokens": tokens, "seconds": round(seconds, 1)}


def pair(a: str, b: str, facts: dict[str, Sequence[dict]]) -> dict:
    """Accuracy of a minus that of b in points, paired by problem and seed; one of them may have a single seed."""
    first, second = (np.array([one["right"] for one in facts[name]]) for name in (a, b))
    return difference(a, b, first - second)


def difference(a: str, b: str, shares: np.ndarray) -> dict:
    found = interval(shares)
    return {"a": a, "b": b, "difference": found.pop("mean"), **found, "problems": shares.shape[1], "seeds": len(shares)}
