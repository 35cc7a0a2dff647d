"""Chains of any model and of its retrofits on any benchmark, with what chapter 6 asks of a ``Pipeline``.

Sampling goes on where it stopped: records are kept as in the main job.  Where the model or the benchmark cannot be
had, ``open_run`` says what would have been fetched, and takes the embedded model instead only if asked to.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import AutoTokenizer

from companion.experiments.main import Pipeline
from companion.experiments.profiles import get_profile
from companion.records import Method, grid_file, run_grid
from companion.tasks import Task, get_task
from companion.tasks.grading import canonical, grade_file
from dms_core.checkpoint import load_base, load_model, read_settings
from dms_core.config import DMSConfig
from dms_core.hub_files import local_directory
from dms_core.model import attach
from dms_core.sampling import SamplingConfig


@dataclass(frozen=True)
class Budgets:
    """What is sampled and reported; the fields of a Profile that curves need."""

    crs: tuple[float, ...]
    problems: int
    chains: int  # sampled a problem: the largest W
    lengths: tuple[int, ...]  # L, generated tokens
    widths: tuple[int, ...]  # W


class BenchmarkRun:
    """The chains of one model on one benchmark in one directory: dense, and with each of its retrofits."""

    def __init__(
        self, model: str, checkpoints: Sequence[Path | str], task: Task, root: Path | str, lengths: Sequence[int],
        chains: int, batch: int = 64, seed: int = 0,
    ) -> None:  # fmt: skip
        """model, checkpoints: directories or hub ids; each checkpoint says its compression ratio.

        Raises ValueError for a model or checkpoint that is not there, without any, and for lengths or chains below 1.
        """
        if not lengths or min(lengths) < 1 or chains < 1:
            raise ValueError(f"lengths {list(lengths)}, chains {chains}: must be one or more lengths, all >= 1")
        if not checkpoints:
            raise ValueError(f"checkpoints {list(checkpoints)}: must be one or more retrofits of the model")
        self.task, self.root, self.batch, self.seed = task, Path(root), batch, seed
        self.base, self.checkpoints = _fetch(model), {}
        for name in checkpoints:
            directory = local_directory(name)
            cr = read_settings(directory).get("cr")
            if not cr:
                raise ValueError(f"{name}: does not say its compression ratio; must have cr in dms.json")
            self.checkpoints[float(cr)] = directory
        self.tokenizer = AutoTokenizer.from_pretrained(self.base)
        if self.tokenizer.pad_token is None:
            self.tokenizer.pad_token = self.tokenizer.eos_token
        widths = tuple(w for w in (1, 2, 4, 8, 16, 32, 64) if w <= chains)
        crs = tuple(sorted(self.checkpoints))
        self.profile = Budgets(crs, len(task.problems), chains, tuple(sorted(lengths)), widths)
        self.aggregate, self.label = task.aggregate, f"{Path(model).name}, {task.name}"

    def methods(self) -> list[Method]:
        return [Method("vanilla", 1.0), *(Method("dms", cr) for cr in self.profile.crs)]

    def records(self, method: Method) -> list[dict]:
        """Graded chain records, answers that the grader holds equal spelt alike."""
        config = SamplingConfig(max(self.profile.lengths), batch=self.batch, seed=self.seed)
        model = self._model(method)
        file = grid_file(model, self.tokenizer, self.task, method, config, self.root / "records")
        records = run_grid(model, self.tokenizer, self.task, method, self.profile.chains, config, file)
        if self.task.grades_later:
            records = grade_file(file, self.task, missing=True)
        return canonical(records)

    def parameters(self) -> int:
        """Weights of the model."""
        return load_base(self.base, dtype="auto").num_parameters()

    def _model(self, method: Method):
        if method.name == "vanilla":
            model = attach(load_base(self.base, dtype="auto"), DMSConfig())  # gates stay off
        else:
            model = load_model(self.checkpoints[method.cr], dtype="auto")
        return model.to("cuda" if torch.cuda.is_available() else "cpu")


def open_run(
    profile: str, run_dir: Path | str, seed: int = 0, model: str = "", checkpoints: Sequence[str] = (),
    task: str = "aime24", source: str = "", lengths: Sequence[int] = (8192, 16384, 32768), chains: int = 8,
    fallback: bool = False,
) -> Pipeline | BenchmarkRun:  # fmt: skip
    """The run that a notebook's parameters ask for: the embedded model's ``profile``, or ``model`` on ``task``.

    source: a local JSONL file in place of the hub.  Raises ValueError that says what would be fetched where it is out
    of reach; with ``fallback`` that is printed instead, and the embedded model takes the place.
    """
    embedded = get_profile(profile)
    if model:
        try:
            problems = get_task(task, source or None)
            return BenchmarkRun(model, checkpoints, problems, run_dir, lengths, chains, seed=seed)
        except ValueError as error:
            if not fallback:
                raise ValueError(f"{error}. Set fallback to go on with the embedded model") from None
            print(f"{error}\nThe embedded model takes the place, as asked for by fallback.", file=sys.stderr)
            run_dir = Path(run_dir) / "embedded"
    return Pipeline(embedded, run_dir, seed=seed)


def _fetch(model: str) -> Path:
    """A directory with the model.  Raises ValueError that says what would be downloaded."""
    try:
        return local_directory(model)
    except ValueError:
        raise ValueError(
            f"model {model!r}: no such directory, and its configuration, tokenizer and safetensors weights cannot be "
            "fetched from the Hugging Face hub"
        ) from None
