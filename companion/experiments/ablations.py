"""Ablations of the method at the embedded scale (paper section 5.3, appendix C): one change at a time.

ablations.yaml lists them.  Every variant starts from the same weights, sees the same documents in the same order and
takes the same number of steps to the same target (but for "steps", which is about their number).  What is finished is
kept in the run directory under a hash of the variant, so variants that several ablations share are trained once.
"""

import math
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import numpy as np
import yaml

from companion.experiments import main as job
from companion.experiments.profiles import Profile, get_profile
from companion.paths import REASONER
from companion.provenance import describe
from companion.records import Method
from dms_core.budgets import bootstrap
from dms_core.storage import read_json, write_json
from dms_core.train.recipe import Recipe

REFERENCE = "dms"  # delayed eviction, w = 16, adapter gate, all weights, forward KL
CR = 4.0


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


def ablation_profile() -> Profile:
    """200 problems, 2 chains, the longest length, after a retrofit of 120 steps."""
    tiny = get_profile("tiny")
    short = {"final_cr": CR, "steps_per_unit": 20, "rests": ((CR, 60),)}
    return replace(
        tiny,
        name="ablations",
        recipe=tiny.recipe.changed(retrofit=short),
        compare_cr=CR,
        crs=(CR,),
        problems=200,
        chains=2,
        lengths=(max(tiny.lengths),),
        widths=(1,),
        batch=120,
        held_out=64,
    )


def make_variants(reference: Recipe) -> dict[str, Recipe]:
    """Every variant by its name: what differs from the reference's gate, and from its training."""
    as_long = math.ceil(reference.retrofit.steps / (reference.retrofit.final_cr - 1))
    variants = {name: reference.changed(name, **changes) for name, changes in _DATA["variants"].items()}
    return variants | {"no-rest": variants["no-rest"].changed(retrofit={"steps_per_unit": as_long})}


def open_ablations(root: Path, profile: Profile | None = None, base: Path = REASONER, seed=0, device=None) -> job.Run:
    """The run that holds all variants."""
    profile = profile or ablation_profile()
    variants = make_variants(profile.recipe.changed(retrofit={"seed": seed}))
    return job.Run(profile, root, base, seed, variants, device=device)


def facts_file(run: job.Run, name: str) -> Path:
    """Where ``measure`` keeps what it found about a variant."""
    profile = run.profile
    what = f"facts-{profile.held_out}-{profile.problems}x{profile.chains}x{max(profile.lengths)}.json"
    return job.checkpoint(run, name, profile.compare_cr) / what


def measure(run: job.Run, name: str) -> dict:
    """Train a variant and measure it, or read what was measured.

    Returns ``held_out`` (see ``heldout.held_out``), the training's ``seconds``, ``tokens`` a chain, and ``right``:
    for each test problem the share of its chains with the right answer.
    """
    file = facts_file(run, name)
    if not file.exists():
        method = Method(name, run.profile.compare_cr)
        seconds, held = job.retrofit(run, name)["seconds"], job.held_out(run, name, method.cr)
        tokens = float(np.mean([record["tokens"] for record in job.records(run, method)]))
        right = job.right(run, method).tolist()
        write_json(file, {"held_out": held, "seconds": seconds, "tokens": tokens, "right": right})
    return read_json(file)


def ablation(name: str, run: job.Run, finished_only: bool = False) -> dict:
    """An ablation's table, ready for JSON; with ``finished_only`` nothing is trained or sampled.

    ``rows``: a variant each; ``pairs``: accuracy of a minus that of b in points over the same problems, with 95 %
    bootstrap intervals over problems.  ``missing``: variants that are not finished.
    """
    study = get_ablation(name)
    done = [v for v in study.variants if not finished_only or facts_file(run, v).exists()]
    facts = {variant: measure(run, variant) for variant in done}
    recipe = run.profile.recipe.retrofit
    return {
        "question": study.question,
        "reference": REFERENCE,
        "recipe": {"dms": asdict(run.profile.recipe.dms), **asdict(recipe), "steps": recipe.steps, "seed": run.seed},
        "rows": [_row(run, variant, facts[variant]) for variant in done],
        "pairs": [_pair(a, b, facts) for a, b in study.pairs if a in facts and b in facts],
        "missing": [v for v in study.variants if v not in done],
        "left_out": study.left_out,
        "environment": describe(),
    }


def _row(run: job.Run, name: str, facts: dict) -> dict:
    dms, recipe, profile = run.variants[name].dms, run.variants[name].retrofit, run.profile
    row = {"variant": name, "eviction": dms.eviction, "window": dms.window, "gate": dms.gate, "train": recipe.train}
    row |= {"loss": recipe.direction, "cr": profile.compare_cr, "steps": recipe.steps}
    row |= {key: facts["held_out"][key] for key in ("cr_decisions", "cr_live", "kl", "agreement", "documents")}
    row |= dict(zip(("accuracy", "low", "high"), bootstrap.mean(facts["right"]), strict=True))
    row |= {"problems": len(facts["right"]), "chains": profile.chains, "L": max(profile.lengths)}
    return row | {"tokens": facts["tokens"], "seconds": round(facts["seconds"], 1)}


def _pair(a: str, b: str, facts: dict) -> dict:
    first, second = (np.array(facts[name]["right"]) for name in (a, b))
    difference, low, high = bootstrap.mean(first - second)
    return {"a": a, "b": b, "difference": difference, "low": low, "high": high, "problems": len(first)}
