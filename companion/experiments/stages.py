"""The main job's stages by name, for batch runs: what each needs, what shapes it, and running one."""

import shutil
import time
from collections.abc import Iterable
from typing import NamedTuple

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
from companion.method import Method, seed_suffix
from dms_core.storage import write_text


class Stage(NamedTuple):
    """What a stage works on: ``name`` is the variant's, or the method's with its ratio; ``run`` is its task's."""

    kind: str  # retrofit, held-out, records, summary
    run: Run
    method: Method | None = None  # of a retrofit the ratio up to which it trains; 1: to its end
    needs: tuple[str, ...] = ()


def stages(run: Run) -> dict[str, Stage]:
    """retrofit-VARIANT, held-out-METHOD, records-TASK-METHOD and summary, each after those that it needs.

    METHOD is such as dms-cr4; what was retrofitted with another seed than the run's ends with -seedN.  All checkpoints
    of the first retrofit are held out, also those that are not sampled.  If several of a retrofit are used, it has a
    stage retrofit-METHOD for each but the last: what needs a checkpoint on the way does not wait for the end.
    """
    sampled, saved = methods(run), [Method("dms", cr) for cr in saved_ratios(run)]
    found = _retrofits(run, dict.fromkeys([*sampled, *saved]))
    for method in sampled:
        needs = _retrofit_for(found, method)
        if needs:
            found[f"held-out-{method}"] = Stage("held-out", run, method, needs)
        for one in run.all_tasks:
            found[f"records-{one.task.name}-{method}"] = Stage("records", one, method, needs)
    for method in saved:
        found.setdefault(f"held-out-{method}", Stage("held-out", run, method, _retrofit_for(found, method)))
    return found | {"summary": Stage("summary", run, None, tuple(found))}


def _retrofit_for(found: dict[str, Stage], method: Method) -> tuple[str, ...]:
    """The first stage after which the checkpoint of a method is there; none for a method without retrofit."""
    for name, stage in found.items():
        whose = stage.method
        trains = stage.kind == "retrofit" and (whose.name, whose.seed) == (method.name, method.seed)
        if trains and (whose.cr == 1 or whose.cr >= method.cr):
            return (name,)
    return ()


def _retrofits(run: Run, methods: Iterable[Method]) -> dict[str, Stage]:
    found = {}
    for name in run.variants:
        for seed in range(run.profile.seeds):
            last = ()
            own = [method for method in methods if (method.name, method.seed) == (name, seed)]
            for way in sorted(own, key=lambda method: method.cr)[:-1]:
                found[f"retrofit-{way}"] = Stage("retrofit", run, way, last)
                last = (f"retrofit-{way}",)
            found[f"retrofit-{name}{seed_suffix(seed)}"] = Stage("retrofit", run, Method(name, 1.0, seed), last)
    return found


def settings(stage: Stage) -> dict:
    """The parameters that shape a stage's result, apart from what it needs; ready for JSON."""
    run, method = stage.run, stage.method
    if stage.kind == "retrofit":
        return recipe_of(run, method.name, method.seed).to_dict() | ({"until": method.cr} if method.cr > 1 else {})
    if stage.kind == "held-out":
        return {"documents": run.profile.held_out, "seed": run.seed}
    if stage.kind == "summary":
        return profile_facts(run)
    shape = {"problems": run.profile.problems, "chains": run.profile.chains, "length": max(run.profile.lengths)}
    return shape | {"seed": run.seed, **({} if stage.needs else {"dms": run.profile.recipe.dms.to_dict()})}


def run_stage(run: Run, name: str, code: str = "") -> dict:
    """Run one stage, or read what is there of it, as all functions of the job do: {"stage", "seconds", "result"}.

    code: a digest of the sources that shape this stage, or "" for whatever they were.  What was begun with another
    digest is deleted first, since names of kept results tell settings but not code.  ValueError for an unknown name.
    """
    known = stages(run)
    if name not in known:
        raise ValueError(f"stage {name!r}: must be one of {', '.join(known)}")
    began, stage = time.time(), known[name]
    kept = f"retrofit-{stage.method.name}{seed_suffix(stage.method.seed)}" if stage.kind == "retrofit" else name
    note = run.root / "stages" / f"{kept}.code"  # one for all parts of a retrofit
    if code and note.exists() and note.read_text() != code:
        _forget(stage)
    if code:
        write_text(note, code)
    return {"stage": name, "result": _result(stage), "seconds": round(time.time() - began, 1)}


def _result(stage: Stage) -> dict:
    from companion.experiments import main as job

    run, method = stage.run, stage.method
    if stage.kind == "retrofit":
        if method.cr > 1:
            return job.retrofit_until(run, method.name, method.cr, method.seed)
        return job.retrofit(run, method.name, method.seed)
    if stage.kind == "held-out":
        return job.held_out(run, method.name, method.cr, method.seed)
    if stage.kind == "summary":
        return job.summary(run)
    found = job.records(run, method)
    facts = {"right": sum(record["correct"] for record in found), "tokens": sum(record["tokens"] for record in found)}
    return {"chains": len(found), **facts}


def _forget(stage: Stage) -> None:
    """Delete what a stage keeps.  A summary is computed anew each time."""
    run, method = stage.run, stage.method
    if stage.kind == "retrofit":
        shutil.rmtree(retrofit_dir(run, method.name, method.seed), ignore_errors=True)
    elif stage.kind == "held-out":
        for file in checkpoint(run, method.name, method.cr, method.seed).glob("held_out-*.json"):
            file.unlink()
    elif stage.kind == "records":
        for file in records_dir(run).glob(f"{method}-{'[0-9a-f]' * 12}*.jsonl"):  # no other seed's
            file.unlink()
