"""Ablations of the method at the embedded scale (paper section 5.3, appendix C): one change at a time.

Every variant starts from the same weights, sees the same documents in the same order and takes the same number of
steps to the same target (but for "steps", which is about their number).  Training, held-out measures and samples are
stages of ``Pipeline``: what is finished is kept in the run directory under a hash of the variant, so variants that
several ablations share are trained once.
"""

import json
import math
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np

from companion.experiments.main import Pipeline, Variant
from companion.experiments.profiles import TINY, Profile
from companion.paths import REASONER
from companion.provenance import describe
from companion.records import Method
from dms_core.config import DMSConfig
from dms_core.train.retrofit import RetrofitConfig

REFERENCE = "dms"  # delayed eviction, w = 16, adapter gate, all weights, forward KL
CR = 4.0
RECIPE = replace(TINY.recipe, final_cr=CR, steps_per_unit=20, rests=((CR, 60),))
PROFILE = replace(
    TINY, name="ablations", recipe=RECIPE, compare_cr=CR, crs=(CR,), problems=200, chains=2,
    lengths=(max(TINY.lengths),), widths=(1,), batch=120, held_out=64,
)  # fmt: skip
RESAMPLES = 1000


@dataclass(frozen=True)
class Ablation:
    """A question, the variants that answer it, and the pairs (a, b) whose accuracies are compared."""

    question: str
    variants: tuple[str, ...]
    pairs: tuple[tuple[str, str], ...]
    left_out: dict[str, str]  # what was not run, and why


def _against_reference(question: str, *variants: str) -> Ablation:
    return Ablation(question, (REFERENCE, *variants), tuple((name, REFERENCE) for name in variants), {})


ABLATIONS = {
    "window": Ablation(
        "Delayed or immediate eviction, and how long a window?",
        ("dms", "immediate-w16", "delayed-w0", "delayed-w4", "immediate-w4", "delayed-w64"),
        (("immediate-w16", "dms"), ("delayed-w0", "dms"), ("delayed-w4", "dms"), ("immediate-w4", "delayed-w4"),
         ("delayed-w64", "dms")),
        {
            "immediate-w0": "without a window nothing can be delayed: both forms evict at once and differ only in "
                            "whether a token or its successor decides",
            "immediate-w64": "the last 64 tokens of a document are undecided and count as kept, so no document shorter "
                             "than 256 tokens can reach CR 4",
        },
    ),
    "steps": _against_reference("How many steps per unit of CR? Is a rest worth it?", "steps-5", "steps-40", "no-rest"),
    "loss": _against_reference("Which divergence from the teacher, or none?", "reverse-kl", "lm-loss"),
    "weights": _against_reference("Which gate, and do all weights train?", "gates-only", "neuron"),
}  # fmt: skip


def get_ablation(name: str) -> Ablation:
    """Raises ValueError for an unknown name."""
    if name not in ABLATIONS:
        raise ValueError(f"ablation {name!r}: must be one of {', '.join(ABLATIONS)}")
    return ABLATIONS[name]


def make_variants(dms: DMSConfig, recipe: RetrofitConfig) -> dict[str, Variant]:
    """Every variant by its name; ``dms`` and ``recipe`` are the reference's."""
    changes = {
        REFERENCE: ({}, {}),
        "immediate-w16": ({"window": 16, "eviction": "immediate"}, {}),
        "delayed-w0": ({"window": 0}, {}),
        "delayed-w4": ({"window": 4}, {}),
        "immediate-w4": ({"window": 4, "eviction": "immediate"}, {}),
        "delayed-w64": ({"window": 64}, {}),
        "steps-5": ({}, {"steps_per_unit": 5}),
        "steps-40": ({}, {"steps_per_unit": 40}),
        "no-rest": ({}, {"steps_per_unit": math.ceil(recipe.steps / (recipe.final_cr - 1)), "rests": ()}),  # as long
        "reverse-kl": ({}, {"direction": "reverse"}),
        "lm-loss": ({}, {"direction": "lm"}),
        "gates-only": ({}, {"train": "gates"}),
        "neuron": ({"gate": "neuron"}, {}),
    }
    return {name: Variant(name, replace(dms, **gate), replace(recipe, **how)) for name, (gate, how) in changes.items()}


class Ablations(Pipeline):
    """A Pipeline whose variants are those of the ablations."""

    def __init__(
        self, root: Path | str, profile: Profile = PROFILE, base: Path | str = REASONER, seed: int = 0
    ) -> None:
        super().__init__(profile, root, base, seed)
        self.variants = make_variants(profile.dms, replace(profile.recipe, seed=seed))

    def facts_file(self, name: str) -> Path:
        """Where ``measure`` keeps what it found about a variant."""
        profile, directory = self.profile, self.checkpoint(name, self.profile.compare_cr)
        return directory / f"facts-{profile.held_out}-{profile.problems}x{profile.chains}x{max(profile.lengths)}.json"

    def measure(self, name: str) -> dict:
        """Train a variant and measure it, or read what was measured.

        Returns ``held_out`` (see ``measure.held_out``), the training's ``seconds``, ``tokens`` a chain, and
        ``right``: for each test problem the share of its chains with the right answer.
        """
        file = self.facts_file(name)
        if not file.exists():
            cr = self.profile.compare_cr
            seconds = self.retrofit(name)["seconds"]
            held = self.held_out(name, cr)
            right = self.right(Method(name, cr))
            tokens = float(np.mean([record["tokens"] for record in self.records(Method(name, cr))]))
            facts = {"held_out": held, "seconds": seconds, "tokens": tokens, "right": right.tolist()}
            file.write_text(json.dumps(facts, indent=1) + "\n")
        return json.loads(file.read_text())

    def result(self, name: str, finished_only: bool = False) -> dict:
        """An ablation's table, ready for JSON; with ``finished_only`` nothing is trained or sampled.

        ``rows``: a variant each; ``pairs``: accuracy of a minus that of b in points over the same problems.
        Intervals are 95 % percentile bootstraps over problems.  ``missing``: variants that are not finished.
        """
        ablation = get_ablation(name)
        done = [v for v in ablation.variants if not finished_only or self.facts_file(v).exists()]
        facts = {variant: self.measure(variant) for variant in done}
        recipe = {**asdict(self.profile.recipe), "steps": self.profile.recipe.steps}
        return {
            "question": ablation.question,
            "reference": REFERENCE,
            "recipe": {"dms": asdict(self.profile.dms), **recipe, "seed": self.seed},
            "rows": [self._row(variant, facts[variant]) for variant in done],
            "pairs": [_pair(a, b, facts) for a, b in ablation.pairs if a in facts and b in facts],
            "missing": [v for v in ablation.variants if v not in done],
            "left_out": ablation.left_out,
            "environment": describe(),
        }

    def _row(self, name: str, facts: dict) -> dict:
        variant, held = self.variants[name], facts["held_out"]
        accuracy, low, high = interval(facts["right"])
        return {
            "variant": name, "eviction": variant.dms.eviction, "window": variant.dms.window, "gate": variant.dms.gate,
            "train": variant.recipe.train, "loss": variant.recipe.direction, "cr": self.profile.compare_cr,
            "steps": variant.recipe.steps, "cr_decisions": held["cr_decisions"], "cr_live": held["cr_live"],
            "kl": held["kl"], "agreement": held["agreement"], "documents": held["documents"], "accuracy": accuracy,
            "low": low, "high": high, "problems": len(facts["right"]), "chains": self.profile.chains,
            "L": max(self.profile.lengths), "tokens": facts["tokens"], "seconds": round(facts["seconds"], 1),
        }  # fmt: skip


def _pair(a: str, b: str, facts: dict) -> dict:
    first, second = (np.array(facts[name]["right"]) for name in (a, b))
    difference, low, high = interval(first - second)
    return {"a": a, "b": b, "difference": difference, "low": low, "high": high, "problems": len(first)}


def interval(values, resamples: int = RESAMPLES, seed: int = 0) -> tuple[float, float, float]:
    """(mean, low, high) of a share per problem (P,), times 100: 95 % percentile bootstrap over problems."""
    values = np.asarray(values, float)
    draws = np.random.default_rng(seed).integers(len(values), size=(resamples, len(values)))
    low, high = np.percentile(values[draws].mean(1), [2.5, 97.5])
    return 100 * float(values.mean()), 100 * float(low), 100 * float(high)
