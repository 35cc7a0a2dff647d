"""How much a retrofit varies: the main job's retrofits with several seeds, measured on the same problems.

A seed changes the retrofit's documents and noise, and nothing else: base model, recipe, test problems and the sampling
of chains stay those of the main job, whose own retrofit is the first seed's and is not trained again.
"""

from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np

from companion.experiments.main import Pipeline, Variant
from companion.experiments.profiles import Profile
from companion.paths import REASONER
from companion.provenance import describe
from companion.records import Method

RESAMPLES = 4000


class Replicas(Pipeline):
    """A Pipeline with one pair of variants, delayed and immediate eviction, for each seed."""

    def __init__(self, profile: Profile, root: Path | str, seeds: Sequence[int], base: Path | str = REASONER) -> None:
        if not seeds or len(set(seeds)) < len(seeds) or min(seeds) < 0:
            raise ValueError(f"seeds {list(seeds)}: must be one or more different integers >= 0")
        super().__init__(profile, root, base)
        self.seeds = tuple(seeds)
        for name, variant in list(self.variants.items()):
            for seed in set(seeds) - {self.seed}:
                recipe = replace(variant.recipe, seed=seed)
                self.variants[_name(name, seed, self.seed)] = Variant(variant.method, variant.dms, recipe)

    def result(self) -> dict:
        """Train, sample and compare, or read what is there; ready for JSON.

        ``rows``: a retrofit and CR each, with its accuracy, the paired difference to the dense model and what it does
        on held-out documents.  ``means``: differences averaged over seeds.  Accuracies in %, differences in points,
        with 95 % intervals: over problems in ``rows``, over seeds and problems in ``means`` (``bootstrap_mean``).
        """
        profile = self.profile
        dense = self.right(Method("vanilla", 1.0))
        compared = [("dms", cr) for cr in profile.crs] + [("dms-immediate", profile.compare_cr)]
        shares = {
            (method, cr): np.stack([self._seed_right(method, cr, seed) for seed in self.seeds])
            for method, cr in compared
        }
        pairs = [(method, "vanilla", cr, right - dense) for (method, cr), right in shares.items()]
        at = profile.compare_cr
        pairs.append(("dms", "dms-immediate", at, shares["dms", at] - shares["dms-immediate", at]))
        return {
            "rows": [self._row(key, i, shares[key][i], dense) for key in shares for i in range(len(self.seeds))],
            "means": [
                {"a": a, "b": b, "cr": cr, **_triple(bootstrap_mean(difference)), "seeds": len(self.seeds)}
                for a, b, cr, difference in pairs
            ],
            "dense": {**_triple(bootstrap_mean(dense[None]), "accuracy")},
            "seeds": list(self.seeds), "problems": profile.problems, "chains": profile.chains,
            "L": max(profile.lengths), "recipe": {**asdict(profile.recipe), "steps": profile.recipe.steps},
            "dms": asdict(profile.dms), "environment": describe(),
        }  # fmt: skip

    def _seed_right(self, method: str, cr: float, seed: int) -> np.ndarray:
        return self.right(Method(_name(method, seed, self.seed), cr))

    def _row(self, key: tuple[str, float], place: int, right: np.ndarray, dense: np.ndarray) -> dict:
        (method, cr), seed = key, self.seeds[place]
        name = _name(method, seed, self.seed)
        held = self.held_out(name, cr)
        return {
            "method": method, "seed": seed, "cr": cr, "cr_decisions": held["cr_decisions"], "cr_live": held["cr_live"],
            "kl": held["kl"], "agreement": held["agreement"], "seconds": round(self.retrofit(name)["seconds"], 1),
            **_triple(bootstrap_mean(right[None]), "accuracy"), **_triple(bootstrap_mean((right - dense)[None])),
        }  # fmt: skip


def bootstrap_mean(values: np.ndarray, resamples: int = RESAMPLES, seed: int = 0) -> tuple[float, float, float]:
    """(mean, low, high), times 100, of shares (S, P) of S seeds on the same P problems.

    95 % percentile bootstrap that draws seeds and problems, each with replacement.  With few seeds it is too narrow:
    three draws of three seeds hold a third of the variance back.
    """
    seeds, problems = values.shape
    rng = np.random.default_rng(seed)
    means = [
        values[rng.integers(seeds, size=seeds)][:, rng.integers(problems, size=problems)].mean()
        for _ in range(resamples)
    ]
    low, high = np.percentile(means, [2.5, 97.5])
    return 100 * float(values.mean()), 100 * float(low), 100 * float(high)


def _name(method: str, seed: int, first: int) -> str:
    return method if seed == first else f"{method}-seed{seed}"


def _triple(values: tuple[float, float, float], name: str = "difference") -> dict:
    prefix = "" if name == "difference" else f"{name}_"
    return {name: values[0], f"{prefix}low": values[1], f"{prefix}high": values[2]}
