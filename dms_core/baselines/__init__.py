"""Training-free ways to a smaller KV cache or fewer reads, on the cache interface and counters of DMS.

``get_baseline("tova")(cr=4)`` is a method's settings and makes its caches:
``sample_chains(model, ..., make_cache=get_baseline("tova")(cr=4))`` inside ``model.dms.disabled()``.
"""

from dms_core.baselines.base import Baseline
from dms_core.baselines.h2o import H2O
from dms_core.baselines.quest import Quest
from dms_core.baselines.random_eviction import RandomEviction
from dms_core.baselines.snapkv import SnapKV
from dms_core.baselines.streaming_llm import StreamingLLM
from dms_core.baselines.tova import TOVA

BASELINES: dict[str, type[Baseline]] = {x.name: x for x in (H2O, TOVA, Quest, StreamingLLM, SnapKV, RandomEviction)}


def get_baseline(name: str) -> type[Baseline]:
    """A method's settings class, whose first argument is the compression ratio.  Raises ValueError for no such name."""
    if name not in BASELINES:
        raise ValueError(f"baseline {name!r}: must be one of {sorted(BASELINES)}")
    return BASELINES[name]
