"""How much a retrofit varies: the main job's retrofits with several seeds, measured on the same problems.

A seed changes the retrofit's documents and noise, and nothing else: base model, recipe, test problems and the sampling
of chains stay those of the main job, whose own retrofit is the first seed's and is not trained again.
"""

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np

from companion.experiments import main as job
from companion.experiments.profiles import Profile
from companion.paths import REASONER
from companion.provenance import describe
from companion.records import Method
from dms_core.budgets.bootstrap import nested_mean


def replicate(profile: Profile, root: Path | str, seeds: Sequence[int], base: Path = REASONER, device=None) -> dict:
    """Train, sample and compare, or read what is there; ready for JSON.

    ``rows``: a retrofit and CR each, with its accuracy, the paired difference to the dense model and what it does on
    held-out documents.  ``means``: differences averaged over seeds.  Accuracies in %, differences in points, with 95 %
    intervals: over problems in ``rows``, over seeds and problems in ``means`` (``bootstrap.nested_mean``).
    """
    run, at = open_replicas(profile, root, seeds, base, device), profile.compare_cr
    dense = job.right(run, Method("vanilla", 1.0))
    compared = [*(("dms", cr) for cr in profile.crs), ("dms-immediate", at)]
    shares = {
        (name, cr): np.stack([job.right(run, Method(_name(name, seed, run.seed), cr)) for seed in seeds])
        for name, cr in compared
    }  # (S, P) each
    pairs = [(name, "vanilla", cr, right - dense) for (name, cr), right in shares.items()]
    pairs.append(("dms", "dms-immediate", at, shares["dms", at] - shares["dms-immediate", at]))
    recipe = profile.recipe.retrofit
    return {
        "rows": [
            _row(run, name, cr, seed, right, dense)
            for (name, cr), rights in shares.items()
            for seed, right in zip(seeds, rights, strict=True)
        ],
        "means": [
            {"a": a, "b": b, "cr": cr, **_interval("difference", difference), "seeds": len(seeds)}
            for a, b, cr, difference in pairs
        ],
        "dense": _interval("accuracy", dense[None]),
        "seeds": list(seeds),
        "problems": profile.problems,
        "chains": profile.chains,
        "L": max(profile.lengths),
        "recipe": {**asdict(recipe), "steps": recipe.steps},
        "dms": asdict(profile.recipe.dms),
        "environment": describe(),
    }


def open_replicas(
    profile: Profile, root: Path | str, seeds: Sequence[int], base: Path = REASONER, device=None
) -> job.Run:
    """The main job's run with one pair of variants, delayed and immediate eviction, for each seed."""
    if not seeds or len(set(seeds)) < len(seeds) or min(seeds) < 0:
        raise ValueError(f"seeds {list(seeds)}: must be one or more different integers >= 0")
    run = job.Run(profile, root, base, device=device)
    for seed in set(seeds) - {run.seed}:
        for name, recipe in job.main_variants(profile, seed).items():
            run.variants[_name(name, seed, run.seed)] = recipe
    return run


def _row(run: job.Run, method: str, cr: float, seed: int, right: np.ndarray, dense: np.ndarray) -> dict:
    name = _name(method, seed, run.seed)
    held = job.held_out(run, name, cr)
    return {
        "method": method,
        "seed": seed,
        "cr": cr,
        **{key: held[key] for key in ("cr_decisions", "cr_live", "kl", "agreement")},
        "seconds": round(job.retrofit(run, name)["seconds"], 1),
        **_interval("accuracy", right[None]),
        **_interval("difference", (right - dense)[None]),
    }


def _name(method: str, seed: int, first: int) -> str:
    return method if seed == first else f"{method}-seed{seed}"


def _interval(name: str, shares: np.ndarray) -> dict:
    """A mean of shares (S, P) with its interval; the bounds of a difference are ``low`` and ``high``."""
    prefix = "" if name == "difference" else f"{name}_"
    return dict(zip((name, f"{prefix}low", f"{prefix}high"), nested_mean(shares), strict=True))
