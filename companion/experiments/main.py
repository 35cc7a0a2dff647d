"""The main job, a function a stage: retrofit → held out → records → summary.

A ``Run`` measures one task; those of the embedded model's three tasks share a directory and their retrofits.  Each
stage keeps its result in that directory under a name that carries a hash of what it depends on: a second call reads it,
an interrupted one goes on, a changed parameter starts anew beside the old.  A study is a ``Run`` of its own: other
variants, other profile, the same functions.
"""

import time

from companion.experiments.embedded import train_recipe
from companion.experiments.heldout import held_out as measure
from companion.experiments.heldout import together
from companion.experiments.run import (
    Run,
    checkpoint,
    methods,
    profile_facts,
    recipe_of,
    records_dir,
    retrofit_dir,
    saved_ratios,
)
from companion.experiments.summaries import merged
from companion.method import Method
from companion.provenance import describe
from companion.records import records_file, sample_records
from companion.tasks.embedded import EMBEDDED
from companion.tasks.grading import canonical, grade_file
from companion.tasks.mixture import TraceDataset
from dms_core.baselines import Baseline
from dms_core.budgets.curves import default_pairs, summarise
from dms_core.checkpoint import fingerprint, is_checkpoint, load_base, load_model
from dms_core.config import DMSConfig
from dms_core.model import attach
from dms_core.sampling import SamplingConfig
from dms_core.storage import read_json, update_json, write_json

# Retrofit.


def retrofit(run: Run, name: str = "dms", seed: int = 0) -> dict:
    """Train a variant, or read what was trained: recipe, steps, seconds and the log.

    seed: of the retrofit, counted from the run's.
    """
    file = retrofit_dir(run, name, seed) / "retrofit.json"
    if not file.exists() or "seconds" not in read_json(file):
        _train(run, name, seed, None)
    return read_json(file)


def retrofit_until(run: Run, name: str, cr: float, seed: int = 0) -> dict:
    """Train a variant as far as its checkpoint at ``cr``, unless it is there: the ratio, and seconds so far."""
    there = is_checkpoint(checkpoint(run, name, cr, seed))
    return {"cr": cr} if there else {"cr": cr, "seconds": _train(run, name, seed, cr)}


def _train(run: Run, name: str, seed: int, until: float | None) -> float:
    """Train on; seconds of all parts so far that ended where they should, also left in a finished run's file."""
    out, began = retrofit_dir(run, name, seed), time.time()
    train_recipe(recipe_of(run, name, seed), out, cpu=run.place == "cpu", base=run.base, until=until)
    part = "end" if until is None else f"cr{until:g}"
    seconds = sum(update_json(out / "seconds.json", **{part: time.time() - began}).values())
    if (out / "retrofit.json").exists():
        update_json(out / "retrofit.json", seconds=seconds)
    return seconds


def held_out(run: Run, name: str, cr: float, seed: int = 0) -> dict:
    """Compression, retention per head, KL and agreement of a checkpoint on validation documents.

    Of all tasks together, and of each in ``by_task``.
    """
    directory = checkpoint(run, name, cr, seed)
    file = directory / f"held_out-{run.profile.held_out}.json"
    if not file.exists():
        write_json(file, compared(run, load_model(directory).to(run.place)))
    return read_json(file)


def compared(run: Run, model) -> dict:
    """The same of a model at hand."""
    teacher = load_base(run.base).to(run.place)
    size, pad = max(run.profile.held_out // len(EMBEDDED), 1), run.tokenizer.pad_token_id
    parts = {
        task: measure(model, teacher, TraceDataset(run.tokenizer, size, 1, "validation", run.seed, [task]), pad)
        for task in EMBEDDED
    }
    return together(parts.values()) | {"by_task": parts}


# Sampling.


def records(run: Run, method: Method) -> list[dict]:
    """Graded chain records of one method on the test problems, answers that the grader holds equal spelt alike."""
    return sampled(run, method, *model_of(run, method), max(run.profile.lengths))


def sampled(run: Run, method: Method, model, weights: str, length: int, baseline: Baseline | None = None) -> list[dict]:
    """The same of a model at hand, up to ``length`` tokens; weights: what tells its weights from others'."""
    own = {"batch": run.profile.batch, "kv_cache_dtype": run.profile.kv_cache_dtype}
    config = SamplingConfig(max_new_tokens=length, seed=run.seed, **own)
    file = records_dir(run) / records_file(model, weights, run.tokenizer, run.task, method, config, baseline)
    found = sample_records(model, run.tokenizer, run.task, method, run.profile.chains, config, file, baseline)
    return canonical(grade_file(file, run.task, missing=True) if run.task.grades_later else found)


def model_of(run: Run, method: Method) -> tuple:
    """(model, what tells its weights from others')."""
    if method.name == "vanilla":  # gates stay off; the same cache and counters
        config = run.profile.recipe.dms if run.profile.recipe else DMSConfig()
        model, weights = attach(load_base(run.base), config), run.base_weights
    else:
        if method.name in run.variants:
            retrofit_until(run, method.name, method.cr, method.seed)
        directory = checkpoint(run, method.name, method.cr, method.seed)
        model, weights = load_model(directory), fingerprint(directory)
    return model.to(run.place), weights


# Summaries.


def run_all(run: Run) -> dict:
    """Every stage in order; returns the summary."""
    for name in run.variants:
        for seed in range(run.profile.seeds):
            retrofit(run, name, seed)
    return summary(run)


def summary(run: Run) -> dict:
    """Points, margins and paired differences of all tasks, and what was held out; also written to curves.json."""
    result = merged([_summarised(one) for one in run.all_tasks])
    facts, top = retrofit(run), run.profile.recipe.retrofit.final_cr
    held = {str(m): held_out(run, m.name, m.cr, m.seed) for m in methods(run) if m.name in run.variants}
    result["retrofit"] = {
        "steps": facts["recipe"]["steps"],
        "seconds": round(facts["seconds"], 1),
        "cr_target": top,
        "cr_measured": held_out(run, "dms", top)["cr_decisions"],
        "cr_live": held_out(run, "dms", top)["cr_live"],
        "ratios": {f"{cr:g}": _fidelity(held_out(run, "dms", cr)) for cr in saved_ratios(run)},
    }
    result |= {"held_out": held, "profile": profile_facts(run), "environment": describe()}
    write_json(run.root / "curves.json", result)
    return result


def _fidelity(held: dict) -> dict:
    return {name: held[name] for name in ("cr_decisions", "cr_live", "kl")}


def _summarised(run: Run) -> dict:
    compared = methods(run)
    chains = [record for method in compared for record in records(run, method)]
    lengths, widths = list(run.profile.lengths), list(run.profile.widths)
    pairs = default_pairs(dict.fromkeys(method.name for method in compared))
    pairs.margins_per_cr.extend(pair for pair in pairs.margins if pair == ("dms", "dms-immediate"))
    return summarise(chains, lengths, widths, aggregate=run.task.aggregate, pairs=pairs)
