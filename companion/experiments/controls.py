"""The controls: what else could make a cache as small, on the same problems, at matched reads and matched peaks.

Training-free methods run as published and, ``-protected``, with the prompt kept whole.  Their budget is (prompt + L) /
CR tokens, so those that keep it run at several L.  Two more have DMS's cache, its delay and its counters: a regression
of future attention on hidden states (``kvzap``), and DMS with marks drawn at random at its own heads' rates
(``dms-random``).
"""

import contextlib
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from itertools import product

from companion.experiments import main as job
from companion.experiments.run import Run
from companion.experiments.summaries import merged
from companion.method import Method
from companion.provenance import describe
from companion.tasks.mixture import TraceDataset
from dms_core.baselines import H2O, RKV, TOVA, Baseline, Quest, RandomEviction, StreamingLLM
from dms_core.baselines.kvzap import attach_scores
from dms_core.baselines.random_marks import random_marks
from dms_core.budgets.curves import default_pairs, summarise
from dms_core.checkpoint import fingerprint, load_base, load_model
from dms_core.storage import write_json

quest = partial(Quest, page=8)  # tokens; the paper's 16 are a sixth of the embedded model's prompts
PUBLISHED: dict[str, Callable[..., Baseline]] = {
    "tova": TOVA,
    "h2o": H2O,
    "streaming-llm": StreamingLLM,
    "quest": quest,
}
CONTROLS: dict[str, Callable[[float], Baseline]] = {
    **PUBLISHED,
    **{f"{name}-protected": partial(make, protect=True) for name, make in PUBLISHED.items()},
    "random-attention": partial(RandomEviction, protect=True),
    "rkv": partial(RKV, protect=True, buffer=16),  # tokens; the authors' 128 are more than a budget here
}
LIGHT = ("kvzap", "dms-random")
RATIOS = (2.0, 4.0)  # of the controls: at 8 their budget is smaller than many prompts
DOCUMENTS = 64  # that kvzap's regression sees


def lengths(run: Run, name: str) -> tuple[int, ...]:
    """The L that a training-free method is given: the largest, and where the prompt is kept the third below it, too."""
    return run.profile.lengths[-1:] if name in PUBLISHED else (run.profile.lengths[-1], run.profile.lengths[-4])


def records(run: Run, name: str, cr: float) -> list[dict]:
    """Graded chains of one control on the run's problems, at all its L."""
    if name in CONTROLS:
        model, weights = job.model_of(run, Method("vanilla", 1.0))
        baseline = CONTROLS[name](cr)
        return [
            record
            for length in lengths(run, name)
            for record in job.sampled(run, Method(name, cr), model, weights, length, baseline)
        ]
    model, weights, marks = _light(run, name, cr)
    with marks:
        return job.sampled(run, Method(name, cr), model.to(run.place), weights, max(run.profile.lengths))


def _light(run: Run, name: str, cr: float) -> tuple:
    """A model, what tells its weights from others', and the context to sample in."""
    if name == "kvzap":
        documents = TraceDataset(run.tokenizer, DOCUMENTS, 1, "retrofit", run.seed)
        ids = [documents[i]["input_ids"] for i in range(DOCUMENTS)]
        model = attach_scores(load_base(run.base), ids, run.profile.recipe.dms.window, cr)
        return model, f"{run.base_weights}/{DOCUMENTS} documents", contextlib.nullcontext()
    job.retrofit(run)
    directory = job.checkpoint(run, "dms", cr)
    model, retention = load_model(directory), job.held_out(run, "dms", cr)["retention"]
    return model, f"{fingerprint(directory)}/random", random_marks(model, retention, run.seed)


def compared(run: Run) -> list[tuple[str, float]]:
    """Every control with each of its ratios; those with DMS's cache have the ratios of DMS."""
    return [*product(CONTROLS, RATIOS), *product(LIGHT, run.profile.crs)]


def grid(run: Run) -> dict:
    """Points, margins and differences of the dense model, DMS and all controls; also written to grid.json.

    One retrofit seed, whatever the profile has.
    """
    began, run = time.time(), replace(run, profile=replace(run.profile, seeds=1))
    result = merged([_summarised(one) for one in run.all_tasks])
    facts = job.profile_facts(run) | {"controls": {"ratios": RATIOS, "methods": [*CONTROLS, *LIGHT]}}
    result |= {"profile": facts, "environment": describe(), "seconds": round(time.time() - began, 1)}
    write_json(run.root / "grid.json", result)
    return result


def _summarised(run: Run) -> dict:
    ours = [method for method in job.methods(run) if method.name in ("vanilla", "dms")]
    chains = [record for method in ours for record in job.records(run, method)]
    chains += [record for name, cr in compared(run) for record in records(run, name, cr)]
    names = ["vanilla", "dms", *dict.fromkeys(name for name, _ in compared(run))]
    lengths, widths = list(run.profile.lengths), list(run.profile.widths)
    return summarise(chains, lengths, widths, aggregate=run.task.aggregate, pairs=default_pairs(names))
