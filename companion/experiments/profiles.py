"""How large a run is: ``smoke`` proves that everything runs, ``tiny`` computes the book's curves."""

from dataclasses import asdict, dataclass, replace

from dms_core.train.recipe import Recipe, load_recipe

PROFILE_NAMES = ("smoke", "tiny")


@dataclass(frozen=True)
class Profile:
    """What is sampled and reported, and the retrofit that precedes it."""

    name: str
    crs: tuple[float, ...]  # compression ratios that are evaluated
    problems: int  # held-out problems
    chains: int  # sampled a problem: the largest W
    lengths: tuple[int, ...]  # L, generated tokens
    widths: tuple[int, ...]  # W
    batch: int = 128  # chains decoded together
    held_out: int = 256  # documents for compression and KL
    recipe: Recipe | None = None  # None: the retrofits were made elsewhere
    compare_cr: float | None = None  # where immediate eviction is compared with delayed

    def facts(self) -> dict:
        """Ready for JSON, the recipe as its settings ``dms`` and ``recipe``."""
        parts = {"dms": asdict(self.recipe.dms), "recipe": asdict(self.recipe.retrofit)} if self.recipe else {}
        return {**asdict(replace(self, recipe=None)), **parts}


def get_profile(name: str) -> Profile:
    """Raises ValueError for an unknown name."""
    if name not in PROFILE_NAMES:
        raise ValueError(f"profile {name!r}: must be one of {sorted(PROFILE_NAMES)}")
    tiny = Profile(
        name="tiny",
        crs=(4.0, 8.0),
        problems=300,
        chains=8,
        lengths=(64, 96, 128, 192, 256, 320, 384, 448),
        widths=(1, 2, 4, 8),
        recipe=load_recipe("reasoner"),
        compare_cr=4.0,
    )
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
        held_out=8,
        recipe=tiny.recipe.changed(retrofit=short),
        compare_cr=2.0,
    )
