"""Dynamic Memory Sparsification: gates, a cache that frees memory, retrofit training, budgets and curves."""

from dms_core.cache.dms import DMSCache
from dms_core.checkpoint import load_gates, load_model, save_gates, save_model
from dms_core.config import DMSConfig
from dms_core.model import attach, detach
from dms_core.train.retrofit import RetrofitConfig, retrofit

__all__ = [
    "DMSCache", "DMSConfig", "RetrofitConfig", "attach", "detach", "load_gates", "load_model", "retrofit",
    "save_gates", "save_model",
]  # fmt: skip
