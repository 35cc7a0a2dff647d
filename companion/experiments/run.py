"""What the main job measures, as data: a dense model, retrofits of it and a task, with one directory for all results.

To plan a run needs no torch: what does is imported where it is asked for.
"""

import hashlib
import json
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path

from companion.experiments.profiles import PROBLEMS_SEED, Profile, get_profile
from companion.method import Method
from companion.paths import REASONER
from companion.tasks import Task, get_task
from companion.tasks.embedded import EMBEDDED
from dms_core.train.recipe import Recipe
from dms_core.train.schedule import checkpoint_dir


@dataclass(frozen=True)
class Run:
    """A dense model, retrofits of it, and a task, with one directory for all results."""

    profile: Profile
    root: Path
    base: Path = REASONER  # directory of the dense model
    seed: int = 0
    variants: dict[str, Recipe] | None = None  # retrofits that are trained here, by method; None: the main job's
    checkpoints: dict[float, Path] = field(default_factory=dict)  # retrofits made elsewhere, by compression ratio
    benchmark: Task | None = None  # None: the embedded one that the profile names
    label: str = "this book"  # what its curves are called
    device: str | None = None  # where models train and run; None: a GPU where there is one

    def __post_init__(self) -> None:
        for name in ("root", "base"):
            object.__setattr__(self, name, Path(getattr(self, name)))
        if self.variants is None:
            object.__setattr__(self, "variants", main_variants(self.profile, self.seed))

    @classmethod
    def of(
        cls, profile: str, runs: Path, seed: int = 0, device: str | None = None, task="traces", base: Path = REASONER
    ) -> "Run":
        """The main job of a profile below ``runs``, at an embedded task; of another model in a folder of its own.

        Raises ValueError for a ``base`` that is no directory of a model.
        """
        if not (Path(base) / "config.json").exists():
            raise ValueError(f"base {base}: must be the directory of a model")
        name = profile if Path(base).resolve() == REASONER.resolve() else f"{profile}-{Path(base).resolve().name}"
        return cls(get_profile(profile, task), Path(runs) / name, base, seed, device=device)

    @cached_property
    def task(self) -> Task:
        seed = PROBLEMS_SEED + self.seed
        return self.benchmark or get_task(self.profile.task, size=self.profile.problems, split="test", seed=seed)

    def at(self, task: str) -> "Run":
        """The same run at another of the embedded tasks."""
        return replace(self, profile=self.profile.at(task))

    @property
    def all_tasks(self) -> list["Run"]:
        """The runs, one a task, that this one belongs to."""
        return [self] if self.benchmark else [self.at(task) for task in EMBEDDED]

    @cached_property
    def place(self) -> str:
        """The device.  Raises ValueError for one that this machine lacks."""
        from companion.devices import checked_device

        return checked_device(self.device)

    @cached_property
    def tokenizer(self):
        from companion.experiments.sample import load_tokenizer

        return load_tokenizer(self.base)

    @cached_property
    def base_weights(self) -> str:
        from dms_core.checkpoint import fingerprint

        return fingerprint(self.base)

    def parameters(self) -> int:
        """Weights of the dense model."""
        from dms_core.checkpoint import load_base

        return load_base(self.base).num_parameters()


def main_variants(profile: Profile, seed: int) -> dict[str, Recipe]:
    """Delayed and immediate eviction; the latter up to the ratio at which they are compared."""
    if profile.recipe is None:
        return {}
    delayed = profile.recipe.changed("dms", retrofit={"seed": seed})
    stop = {"stop_cr": profile.compare_cr}
    return {
        "dms": delayed,
        "dms-immediate": delayed.changed("dms-immediate", dms={"eviction": "immediate"}, retrofit=stop),
    }


def methods(run: Run) -> list[Method]:
    """The dense model, its retrofits at each ratio and, in the main job, immediate eviction; all seeds of each."""
    compared = [("dms", cr) for cr in run.profile.crs]
    compared += [("dms-immediate", run.profile.compare_cr)] * ("dms-immediate" in run.variants)
    return [Method("vanilla", 1.0), *(Method(*which, seed) for which in compared for seed in range(run.profile.seeds))]


def saved_ratios(run: Run) -> list[float]:
    """The ratios at which the main retrofit leaves a checkpoint."""
    return sorted(run.profile.recipe.retrofit.schedule.saves().values())


def profile_facts(run: Run) -> dict:
    """The profile's settings, those of each task in "tasks"."""
    tasks = {one.task.name: one.profile.facts() for one in run.all_tasks}
    own = ("task", "problems", "lengths", "widths")
    shared = {name: value for name, value in run.profile.facts().items() if name not in own}
    return shared | {"tasks": {task: {name: facts[name] for name in own[1:]} for task, facts in tasks.items()}}


# Where things lie.


def recipe_of(run: Run, name: str, seed: int = 0) -> Recipe:
    """How a variant is trained."""
    recipe = run.variants[name]
    return recipe.changed(recipe.name, retrofit={"seed": recipe.retrofit.seed + seed}) if seed else recipe


def retrofit_dir(run: Run, name: str, seed: int = 0) -> Path:
    """Where a variant's training and checkpoints lie."""
    facts = [recipe_of(run, name, seed).to_dict(), run.base_weights]
    return run.root / f"{name}-{hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:8]}"


def checkpoint(run: Run, name: str, cr: float, seed: int = 0) -> Path:
    """Where the checkpoint of a variant at a compression ratio is, or will be."""
    return run.checkpoints[cr] if run.checkpoints else checkpoint_dir(retrofit_dir(run, name, seed), cr)


def records_dir(run: Run) -> Path:
    """Where the records of the run's task lie."""
    return run.root / "records" / run.task.name.replace(":", "-")
