"""Chains of one model and method on a benchmark in a directory of their own.

The directory holds ``records/*.jsonl``, one file a (method, CR) and shard, and ``run.json``: the task, the lengths and
widths to report, and for each method its file, the length up to which it was sampled and the arguments of the chat
template.
"""

import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from companion.devices import checked_device, checked_dtype
from companion.experiments.summaries import SIDECAR, check_limits
from companion.method import Method
from companion.records import records_file, sample_records
from companion.shards import WHOLE, Shard
from companion.tasks import Task
from companion.tasks.grading import grade_file
from companion.tasks.sandbox import sandbox
from dms_core import checkpoint
from dms_core.baselines import BASELINE_NAMES, Baseline, get_baseline
from dms_core.budgets.curves import summarise
from dms_core.chat import check_arguments
from dms_core.checkpoint import fast_dtype, fingerprint, load_base, load_gates, load_model, read_settings
from dms_core.config import DMSConfig
from dms_core.hub_files import local_directory
from dms_core.interop import is_foreign
from dms_core.model import attach
from dms_core.parallel import tensor_parallel
from dms_core.sampling import SamplingConfig
from dms_core.storage import is_written, only_writer, read_json, read_jsonl, write_json


def load_dense(name: str, device: str | None = None):
    """A model on ``device`` (see checked_device) in its fast dtype, and its tokenizer, of a directory or hub id."""
    directory, device = local_directory(name), checked_device(device)
    return load_base(directory, dtype=fast_dtype(device)).to(device), load_tokenizer(directory)


def load_tokenizer(name: Path | str):
    """A tokenizer that can pad."""
    tokenizer = checkpoint.load_tokenizer(name)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


@dataclass(frozen=True)
class ModelSpec:
    """A model and the method by which it is sampled.

    model: a directory or hub id, retrofitted for the method ``dms`` unless ``gates`` names what to load on it; with
    ``vanilla`` gates stay off, and of ``gates`` only the weights' change counts.  cr: None for what that checkpoint
    says.  device: see ``checked_device``, or "auto" for layers spread over the cards.  Raises ValueError for what no
    model is needed to see.
    """

    model: str
    method: str
    cr: float | None = None
    gates: str | None = None
    device: str | None = None
    dtype: str = "auto"

    def __post_init__(self) -> None:
        method, cr = self.method, self.cr
        if method not in ("vanilla", "dms", *BASELINE_NAMES):
            raise ValueError(f"method {method!r}: must be one of vanilla, dms, {', '.join(sorted(BASELINE_NAMES))}")
        if method in BASELINE_NAMES and cr is None:
            raise ValueError(f"--method {method}: needs --cr, the compression ratio of its budget")
        if cr is not None and not 1 <= cr < math.inf:
            raise ValueError(f"cr {cr}: must be a finite number >= 1")
        if method == "vanilla" and cr not in (None, 1):
            raise ValueError(f"cr {cr:g} with method vanilla: must be left out, it evicts nothing")
        if self.gates and method not in ("dms", "vanilla"):
            raise ValueError(f"gates {self.gates} with method {method!r}: must be with dms or vanilla")

    def load(self) -> "Loaded":
        """The model on its device, with its gates.  Raises ValueError where model or ratio are wrong."""
        device, dtype = _process_device(self.device), checked_dtype(self.dtype)
        directory, trained = local_directory(self.model), local_directory(self.gates or self.model)
        method = Method(self.method, self._ratio(trained))
        tokenizer = load_tokenizer(directory)
        model = _load(directory, trained if self.gates or self.method == "dms" else None, device, dtype)
        baseline = get_baseline(method.name)(method.cr) if method.name in BASELINE_NAMES else None
        weights = "".join(map(fingerprint, dict.fromkeys([directory, trained])))
        return Loaded(model, tokenizer, method, baseline, weights)

    def _ratio(self, directory: Path) -> float:
        """The method's compression ratio.  Raises ValueError for one that is not the checkpoint's."""
        trained = checkpoint_ratio(directory) if self.method == "dms" else 1.0 if self.method == "vanilla" else None
        name = self.gates or self.model
        if self.cr and trained and self.cr != trained:
            raise ValueError(f"cr {self.cr:g}: {name} was trained to {trained:g}; leave --cr out")
        if not (self.cr or trained):
            raise ValueError(f"{name} does not say its compression ratio: give --cr")
        return float(self.cr or trained)


class Loaded(NamedTuple):
    """What a ModelSpec loads; weights: what tells its weights from others'."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    method: Method
    baseline: Baseline | None
    weights: str


def sample_benchmark(
    spec: ModelSpec,
    task: Task,
    chains: int,
    config: SamplingConfig,
    out: Path,
    lengths: Sequence[int] = (),
    widths: Sequence[int] = (),
    *,
    workers: int = 1,
    unsafe: bool = False,
    shard: Shard = WHOLE,
) -> dict:
    """Sample chains, or go on where it was interrupted, and grade them.  Under torchrun its processes split the model.

    lengths, widths: budgets of the curves, noted in run.json (default: up to those sampled). workers: programs
    graded at once. shard: the part of the chains to sample, to a file of its own.
    Returns {"task", "method", "cr", "file", "records", "pass_at_1"} of that part, the last None where nothing is
    graded and in other processes than the first.  Raises ValueError where a count is below 1, the model cannot be
    loaded, or ``out`` belongs to another task.
    """
    longest = config.max_new_tokens
    lengths = list(lengths) or sorted({max(1, longest // 4), max(1, longest // 2), longest})
    widths = list(widths) or [w for w in (1, 2, 4, 8, 16, 32) if w <= chains]
    for name, values in {"lengths": lengths, "widths": widths, "chains": [chains], "workers": [workers]}.items():
        if min(values, default=1) < 1:
            raise ValueError(f"{name} {', '.join(map(str, values))}: must be >= 1")
    check_limits(lengths, {spec.method: longest})
    _noted(out, task)  # may refuse
    model, tokenizer, method, baseline, weights = spec.load()
    check_arguments(tokenizer, task.template)
    first = model.dms.split.rank == 0
    whole = out / "records" / records_file(model, weights, tokenizer, task, method, config, baseline)
    if first:
        _note(out, task, method, whole.name, lengths, widths, longest)
    file = shard.file(whole)
    records = sample_records(model, tokenizer, task, method, chains, config, whole, baseline, shard)
    if task.grades_later and first:
        records = _graded(records, task, file, whole, workers, unsafe)
    known = [record for record in records if record["correct"] is not None] if first else []
    score = summarise(known, [longest], [1], 1)["pass_at_1"][0] if known else None
    facts = {"task": task.name, "method": method.name, "cr": method.cr, "file": str(file), "records": len(records)}
    return {**facts, "pass_at_1": score}


def _note(
    out: Path, task: Task, method: Method, name: str, lengths: list[int], widths: list[int], longest: int
) -> None:
    """Say in run.json that ``method`` has its file of records of up to ``longest`` tokens; what others noted stays.

    Raises ValueError for lengths up to which some method was not sampled.
    """
    with only_writer(out, wait=60):  # the jobs of a cluster start together
        note = _noted(out, task)
        limits = note.get("limits", {}) | {str(method): longest}
        check_limits(lengths, limits)
        templates = note.get("template", {}) | {str(method): dict(task.template)}
        templates = {key: arguments for key, arguments in templates.items() if arguments}
        records = note["records"] | {str(method): name}
        facts = {"lengths": lengths, "widths": widths, "records": records, "template": templates, "limits": limits}
        write_json(out / SIDECAR, note | facts)


def _graded(records: list[dict], task: Task, file: Path, whole: Path, workers: int, unsafe: bool) -> list[dict]:
    """The records with verdicts, graded in place in ``file``, and in ``whole`` where it was left ungraded.

    As they are where programs cannot be run.
    """
    if not unsafe and (reason := sandbox.why_not()):
        print(f"not graded: {reason}; grade with dms grade {file} --task {task.name}", file=sys.stderr)
        return records
    verdicts = {}
    left = file != whole and whole.exists() and any(r["correct"] is None for r in read_jsonl(whole))
    for part in [file, *[whole] * left]:
        try:
            graded = grade_file(part, task, workers, missing=True)
        except ValueError:
            if part == file or not is_written(part):  # another shard grades it
                raise
            continue
        verdicts |= {(r["problem"], r["chain"]): r["correct"] for r in graded}
    return [r | {"correct": verdicts.get((r["problem"], r["chain"]), r["correct"])} for r in records]


def _process_device(name: str | None) -> str | None:
    """``checked_device``, or "auto"; None under torchrun, where each process takes the device of its rank."""
    if not tensor_parallel():
        return name if name == "auto" else checked_device(name)
    if name is not None:
        raise ValueError(f"device {name!r}: must be left out under torchrun")
    return None


def _load(directory: Path, trained: Path | None, device: str | None, dtype: str):
    """The model with gates: those of ``trained``, which may be the model itself, or silent ones.

    device: None for the part of this process, "auto" for layers spread over the cards.
    """
    spread = {"device_map": "auto"} if device == "auto" else tensor_parallel()
    options = {"dtype": dtype, **spread}
    if trained == directory:
        model = load_model(directory, **options)
    else:
        base = load_base(directory, **options)
        model = load_gates(base, trained) if trained else attach(base, DMSConfig())
    return model if spread else model.to(device)


def checkpoint_ratio(directory: Path) -> float | None:
    """The compression ratio that a retrofitted model says it was trained for, ours or the authors'."""
    if is_foreign(directory):
        return read_json(directory / "config.json").get("dms_cr")
    return read_settings(directory).get("cr")


def _noted(out: Path, task: Task) -> dict:
    """What run.json holds.  Raises ValueError where it is of another task."""
    old = read_json(out / SIDECAR) if (out / SIDECAR).exists() else {"task": task.name, "records": {}}
    if old["task"] != task.name:
        raise ValueError(f"{out} holds records of {old['task']!r}: take another directory for {task.name!r}")
    return old
