"""Training-free ways to a smaller KV cache or fewer reads, on the cache interface and counters of DMS.

``get_baseline("tova")(cr=4)`` is a method's settings and makes its caches:
``sample_chains(model, ..., make_cache=get_baseline("tova")(cr=4))`` inside ``model.dms.disabled()``.
With ``protect=True`` the prompt is kept (see base); ``get_baseline("random")(cr=4, protect=True)`` is Random Attention.
Not of these: what acts through a DMSCache (kvzap, random_marks), and DMC (dmc).
"""

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


def get_baseline(name: str) -> type[Baseline]:
    """A method's settings class, whose first argument is the compression ratio.  Raises ValueError for no such name."""
    if name not in BASELINES:
        raise ValueError(f"baseline {name!r}: must be one of {sorted(BASELINES)}")
    return BASELINES[name]
