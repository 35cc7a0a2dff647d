"""How large a reproduction is: ``smoke`` proves that everything runs, ``tiny`` computes the book's curves."""

from dataclasses import dataclass, replace

from dms_core.config import DMSConfig
from dms_core.train.recipe import load_recipe
from dms_core.train.retrofit import RetrofitConfig


@dataclass(frozen=True)
class Profile:
    """One reproduction of the main job with the embedded model."""

    name: str
    dms: DMSConfig
    recipe: RetrofitConfig
    compare_cr: float  # where immediate eviction is compared with delayed
    crs: tuple[float, ...]  # checkpoints that are evaluated
    problems: int  # held-out problems
    chains: int  # sampled a problem: the largest W
    lengths: tuple[int, ...]  # L, generated tokens
    widths: tuple[int, ...]  # W
    batch: int = 128  # chains decoded together
    held_out: int = 256  # documents for compression and KL


_REASONER = load_recipe("reasoner")  # dms_core/recipes/reasoner.yaml

TINY = Profile(
    name="tiny",
    dms=_REASONER.dms,
    recipe=_REASONER.retrofit,
    compare_cr=4.0,
    crs=(4.0, 8.0),
    problems=300,
    chains=8,
    lengths=(64, 96, 128, 192, 256, 320, 384, 448),
    widths=(1, 2, 4, 8),
)

SMOKE = replace(
    TINY,
    name="smoke",
    recipe=replace(TINY.recipe, final_cr=3.0, steps_per_unit=4, rests=((3.0, 2),), batch=4, save_steps=5, warmup=0),
    compare_cr=2.0,
    crs=(2.0, 3.0),
    problems=6,
    chains=2,
    widths=(1, 2),
    batch=12,
    held_out=8,
)

PROFILES = {profile.name: profile for profile in (SMOKE, TINY)}


def get_profile(name: str) -> Profile:
    """Raises ValueError for an unknown name."""
    if name not in PROFILES:
        raise ValueError(f"profile {name!r}: must be one of {sorted(PROFILES)}")
    return PROFILES[name]
