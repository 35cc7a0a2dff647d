"""Chains of any model and of its retrofits on any benchmark, as a ``Run`` of the main job's functions.

Where the model or the benchmark cannot be had, ``open_run`` says what would have been fetched, and takes the embedded
model instead only if told to.
"""

import sys
from collections.abc import Sequence
from pathlib import Path

from companion.experiments.profiles import Profile, get_profile
from companion.experiments.run import Run
from companion.tasks import get_task
from dms_core.checkpoint import read_settings
from dms_core.hub_files import local_directory


def benchmark_run(
    model: str,
    checkpoints: Sequence[Path | str],
    task,
    root: Path | str,
    lengths: Sequence[int],
    chains: int,
    seed: int,
) -> Run:
    """The chains of one model on one benchmark in one directory: dense, and with each of its retrofits.

    model, checkpoints: directories or hub ids; each checkpoint says its compression ratio.  Raises ValueError for a
    model or checkpoint that is not there, without any, and for lengths or chains below 1.
    """
    if not lengths or min(lengths) < 1 or chains < 1:
        raise ValueError(f"lengths {list(lengths)}, chains {chains}: must be one or more lengths, all >= 1")
    if not checkpoints:
        raise ValueError(f"checkpoints {list(checkpoints)}: must be one or more retrofits of the model")
    base, retrofits = local_directory(model), {}
    for name in checkpoints:
        directory = local_directory(name)
        cr = read_settings(directory).get("cr")
        if not cr:
            raise ValueError(f"{name}: does not say its compression ratio; must have cr in dms.json")
        retrofits[float(cr)] = directory
    widths = tuple(w for w in (1, 2, 4, 8, 16, 32, 64) if w <= chains)
    crs = tuple(sorted(retrofits))
    profile = Profile(task.name, crs, len(task.problems), chains, tuple(sorted(lengths)), widths, batch=64)
    label = f"{Path(model).name}, {task.name}"
    return Run(profile, root, base, seed, checkpoints=retrofits, benchmark=task, label=label)


def open_run(
    profile: str,
    run_dir: Path | str,
    seed: int = 0,
    model: str = "",
    checkpoints: Sequence[str] = (),
    task: str = "aime24",
    source: str = "",
    lengths: Sequence[int] = (8192, 16384, 32768),
    chains: int = 8,
    fallback: bool = False,
) -> Run:
    """The run that a notebook's parameters ask for: the embedded model's ``profile``, or ``model`` on ``task``.

    source: a local JSONL file in place of the hub.  Raises ValueError that says what would be fetched where it is out
    of reach; with ``fallback`` that is printed instead, and the embedded model takes the place.
    """
    embedded = get_profile(profile)
    if model:
        try:
            problems = get_task(task, source or None)
            return benchmark_run(model, checkpoints, problems, run_dir, lengths, chains, seed)
        except ValueError as error:
            if not fallback:
                raise ValueError(f"{error}. Set fallback to go on with the embedded model") from None
            print(f"{error}\nThe embedded model takes the place, as asked for by fallback.", file=sys.stderr)
            run_dir = Path(run_dir) / "embedded"
    return Run(embedded, run_dir, seed=seed)
