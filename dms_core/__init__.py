"""Dynamic Memory Sparsification: gates, a cache that frees memory, retrofit training, budgets and curves.

The names below are imported when they are first used: ``import dms_core`` alone loads no torch.  In the examples of
their docstrings ``model`` is a causal language model of transformers; the tests run them on a tiny random Llama.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # the same names for static tools
    from dms_core.budgets.curves import summarise  # noqa: F401
    from dms_core.cache.dms import DMSCache  # noqa: F401
    from dms_core.checkpoint import load_base, load_gates, load_model, save_gates, save_model  # noqa: F401
    from dms_core.config import DMSConfig  # noqa: F401
    from dms_core.model import attach, detach  # noqa: F401
    from dms_core.sampling import SamplingConfig, sample_chains  # noqa: F401
    from dms_core.train.recipe import RetrofitConfig, load_recipe  # noqa: F401
    from dms_core.train.retrofit import retrofit  # noqa: F401

_HOMES = {
    "budgets.curves": ("summarise",),
    "cache.dms": ("DMSCache",),
    "checkpoint": ("load_base", "load_gates", "load_model", "save_gates", "save_model"),
    "config": ("DMSConfig",),
    "model": ("attach", "detach"),
    "sampling": ("SamplingConfig", "sample_chains"),
    "train.recipe": ("RetrofitConfig", "load_recipe"),
    "train.retrofit": ("retrofit",),
}
_HOME = {name: home for home, names in _HOMES.items() for name in names}

__all__ = sorted(_HOME)


def __getattr__(name: str):
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
