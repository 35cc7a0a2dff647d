"""lm-evaluation-harness on retrofitted models: any of its tasks, with the KV budget of paper section 5.1 beside it.

Loglikelihood requests run through the full forward, where what was evicted is masked; generate_until requests run
through ``generate`` with a DMSCache, whose counters say what was read and held.  Needs the extra ``eval``.
"""

import contextlib
from pathlib import Path

import torch
from torch import Tensor

from dms_core.cache.dms import DMSCache
from dms_core.checkpoint import is_checkpoint, load_base, load_model
from dms_core.config import DMSConfig
from dms_core.hub_files import local_directory
from dms_core.model import attach

try:
    from lm_eval import simple_evaluate
    from lm_eval.api.registry import register_model
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager
except ImportError as error:
    raise ImportError(f"lm-evaluation-harness is needed: pip install 'dms-companion[eval]' ({error})") from error

BUDGET = ("kv_reads", "dense_kv_reads", "peak_tokens", "dense_peak_tokens")


@register_model("dms")
class DMSLM(HFLM):
    """The harness's ``hf`` model over a model with gates; ``simple_evaluate(model="dms", ...)`` finds it by name."""

    def __init__(self, pretrained, tokenizer=None, gates: bool = True, page: int = 16, device=None, **options) -> None:
        """``pretrained``: a model with gates, a directory or a hub id (without gates in it: a plain model, dense).

        ``tokenizer``: one, or where to find it (default: beside the model).  ``gates`` False evicts nothing.
        ``page``: tokens a cache page.  ``options``: those of HFLM, such as batch_size.
        """
        if isinstance(pretrained, (str, Path)):
            directory = local_directory(pretrained)
            tokenizer = str(directory) if tokenizer is None else tokenizer
            gated = is_checkpoint(directory)
            gates = gates and gated
            pretrained = load_model(directory) if gated else attach(load_base(directory), DMSConfig())
        elif getattr(pretrained, "dms", None) is None:
            raise ValueError(f"{type(pretrained).__name__} has no DMS gates: call dms_core.attach(model, config) first")
        self.gates, self.page = gates, page
        self.budgets: list[Tensor] = []  # one entry a batch: (len(BUDGET), rows)
        super().__init__(pretrained if device is None else pretrained.to(device), tokenizer=tokenizer, **options)

    def _mode(self):
        return contextlib.nullcontext() if self.gates else self.model.dms.disabled()

    def _model_call(self, inps, attn_mask=None, labels=None) -> Tensor:
        # Padding is on the right: no real token sees it, and what it decides concerns padding's queries alone.
        with self._mode():
            return super()._model_call(inps, attn_mask, labels)

    def _model_generate(self, context, max_length, stop, **generation) -> Tensor:
        cache = DMSCache.for_model(self.model, self.page)
        with self._mode():
            out = super()._model_generate(context, max_length, stop, past_key_values=cache, **generation)
        prompt = generation["attention_mask"].sum(1).repeat_interleave(cache.batch_size // len(context))
        tokens = cache.tokens_seen()
        steps = tokens - prompt
        dense_reads = steps * prompt + steps * (steps + 1) // 2  # sum over steps of the tokens seen
        reads, peak = (counts.double().mean((0, 2)) for counts in (cache.kv_reads(), cache.peak_tokens()))
        self.budgets.append(torch.stack([reads, dense_reads, peak, tokens]).double().cpu())
        return out

    def budget(self) -> dict | None:
        """Means over the generations so far, per KV head, of KV reads and peak tokens, and of a dense cache's.

        ``cr_reads`` and ``cr_peak`` are dense over held.  In a batch, a row that has ended goes on until the longest
        one ends, as in ``generate``, and is counted: batch size 1 counts exactly what was asked for.
        """
        if not self.budgets:
            return None
        rows = torch.cat(self.budgets, 1)
        reads, dense_reads, peak, dense_peak = means = [row.mean().item() for row in rows]
        ratios = {"cr_reads": dense_reads / reads if reads else None, "cr_peak": dense_peak / peak}
        return {"generations": rows.shape[1], **dict(zip(BUDGET, means, strict=True)), **ratios}


def find_tasks(tasks: list[str], include: Path | None = None, defaults: bool = True) -> TaskManager:
    """The harness's tasks and those in the folder ``include``.  Raises ValueError for a name not among them.

    A name may be a pattern such as mmlu_*, or a task file; ``defaults`` False leaves out the harness's own.
    """
    manager = TaskManager(include_path=None if include is None else str(include), include_defaults=defaults)
    if unknown := [name for name in tasks if not manager.match_tasks([name]) and not Path(name).is_file()]:
        known = len(manager.all_tasks)
        raise ValueError(f"tasks {unknown}: not among the {known} known; `lm-eval ls tasks` lists them")
    return manager


def evaluate(lm: DMSLM, tasks: list[str], manager: TaskManager, limit: int | None = None, **options) -> dict:
    """Run tasks that ``find_tasks`` has found; ``options`` go to the harness's simple_evaluate.

    Returns {"gates", "results": {task: {metric: value}}, "samples": {task: number}, "kv": ``budget()``}.
    """
    lm.budgets.clear()
    found = simple_evaluate(lm, tasks=tasks, limit=limit, task_manager=manager, log_samples=False, **options)
    samples = {task: count["effective"] for task, count in found["n-samples"].items()}
    return {"gates": lm.gates, "results": found["results"], "samples": samples, "kv": lm.budget()}
