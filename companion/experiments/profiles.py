"""How large a run is: ``smoke`` shows that all runs, ``tiny`` computes the book's curves, ``full`` the stored ones."""

from dataclasses import asdict, dataclass, replace

from companion.tasks.embedded import EMBEDDED
from dms_core.train.recipe import Recipe, load_recipe

PROFILE_NAMES = ("smoke", "tiny", "full")
LENGTHS = {  # L, generated tokens, of each embedded task
    "traces": (128, 160, 192, 256, 320, 384, 448, 544),
    "choice": (128, 160, 192, 256, 320, 384, 448, 576),
    "search": (64, 96, 128, 192, 256, 384, 512, 640),
}


PROBLEMS_SEED = 1  # of the test problems of run 0; those of seed 0 were looked at while recipes were chosen


@dataclass(frozen=True)
class Profile:
    """What is sampled of one task and reported, and the retrofit that precedes it."""

    name: str
    crs: tuple[float, ...]  # compression ratios that are evaluated
    problems: int  # held-out problems
    chains: int  # sampled a problem: the largest W
    lengths: tuple[int, ...]  # L, generated tokens
    widths: tuple[int, ...]  # W
    batch: int = 128  # chains decoded together
    held_out: int = 255  # documents for compression and KL, of all tasks
    recipe: Recipe | None = None  # None: the retrofits were made elsewhere
    compare_cr: float | None = None  # where immediate eviction is compared with delayed
    task: str = "traces"  # the embedded one
    seeds: int = 1  # retrofits of each kind
    kv_cache_dtype: str = "auto"  # or int8: pages of 8 bits

    def at(self, task: str) -> "Profile":
        """The same at another of the embedded tasks, with its lengths unless these were changed.

        Raises ValueError for an unknown task.
        """
        if task not in LENGTHS:
            raise ValueError(f"task {task!r}: must be one of {', '.join(EMBEDDED)}")
        usual = self.lengths == LENGTHS[self.task]
        return replace(self, task=task, lengths=LENGTHS[task] if usual else self.lengths)

    def facts(self) -> dict:
        """Ready for JSON, the recipe as its settings ``dms`` and ``recipe``."""
        parts = {"dms": asdict(self.recipe.dms), "recipe": asdict(self.recipe.retrofit)} if self.recipe else {}
        return {**asdict(replace(self, recipe=None)), **parts}


def get_profile(name: str, task: str = "traces") -> Profile:
    """Raises ValueError for an unknown name or task."""
    if name not in PROFILE_NAMES:
        raise ValueError(f"profile {name!r}: must be one of {sorted(PROFILE_NAMES)}")
    full = Profile(
        name="full",
        crs=(4.0, 8.0),
        problems=300,
        chains=8,
        lengths=LENGTHS["traces"],
        widths=(1, 2, 4, 8),
        recipe=load_recipe("reasoner"),
        compare_cr=4.0,
        seeds=3,
    ).at(task)
    if name == "full":
        return full
    # For the time of `make book`: two thirds of the documents a step; a step in two parts pads less.
    quick = full.recipe.changed(retrofit={"batch": 8, "device_batch": 4})
    tiny = replace(full, name="tiny", problems=100, seeds=1, held_out=120, recipe=quick)
    if name == "tiny":
        return tiny
    short = {"final_cr": 3.0, "steps_per_unit": 4, "rests": ((3.0, 2),), "batch": 4, "save_steps": 5, "warmup": 0}
    return replace(
        tiny,
        name="smoke",
        crs=(2.0, 3.0),
        problems=6,
        chains=2,
        widths=(1, 2),
        batch=12,
        held_out=9,
        recipe=full.recipe.changed(retrofit=short),
        compare_cr=2.0,
    )
