"""Training-free ways to a smaller KV cache or fewer reads, on the cache interface and counters of DMS.

``get_baseline("tova")(cr=4)`` is a method's settings and makes its caches:
``sample_chains(model, ..., make_cache=get_baseline("tova")(cr=4))`` inside ``model.dms.disabled()``.
With ``protect=True``, or as ``get_baseline("tova-protected")``, the prompt is kept (see base); ``random-protected`` is
Random Attention.
Not of these: what acts through a DMSCache (kvzap, random_marks), and DMC (dmc).
"""

from collections.abc import Callable
from functools import partial

from dms_core.baselines.base import Baseline
from dms_core.baselines.h2o import H2O
from dms_core.baselines.quest import Quest
from dms_core.baselines.random_eviction import RandomEviction
from dms_core.baselines.rkv import RKV
from dms_core.baselines.snapkv import SnapKV
from dms_core.baselines.streaming_llm import StreamingLLM
from dms_core.baselines.tova import TOVA

METHODS = (H2O, TOVA, Quest, StreamingLLM, SnapKV, RandomEviction, RKV)
BASELINES: dict[str, type[Baseline]] = {x.name: x for x in METHODS}
PROTECTED = {f"{x.name}-protected": partial(x, protect=True) for x in METHODS if x is not SnapKV}
BASELINE_NAMES = (*BASELINES, *PROTECTED)


def get_baseline(name: str) -> Callable[..., Baseline]:
    """What makes a method's settings, by the compression ratio first.  Raises ValueError for no such name."""
    if name not in BASELINE_NAMES:
        raise ValueError(f"baseline {name!r}: must be one of {sorted(BASELINE_NAMES)}")
    return (BASELINES | PROTECTED)[name]
