"""The stages of the main job by name, for batch runs: what each needs, what shapes it, and how to run it alone.

    retrofit-METHOD  →  held-out-METHOD-crN, records-METHOD-crN  →  summary

A stage's result is kept where ``Pipeline`` keeps it, so that notebooks find it.  Names of kept results carry a hash of
the settings but not of the code: a batch run hands a digest of the sources along, and results of other sources go.
"""

import shutil
import time
from dataclasses import asdict, dataclass
from pathlib import Path

from companion.experiments.main import Pipeline
from companion.records import Method


@dataclass(frozen=True)
class Stage:
    """One step of the main job."""

    kind: str  # retrofit, held-out, records or summary
    needs: tuple[str, ...]  # names of the stages before it
    settings: dict  # values that, once changed, make another result
    method: Method | None = None  # None: summary; a retrofit has the CR at which it ends


def stages(pipeline: Pipeline) -> dict[str, Stage]:
    """All stages by name, each after those that it needs."""
    profile, found = pipeline.profile, {}
    for name, variant in pipeline.variants.items():
        settings = {"dms": asdict(variant.dms), "recipe": asdict(variant.recipe), "seed": pipeline.seed}
        last = variant.recipe.stop_cr or variant.recipe.final_cr
        found[f"retrofit-{name}"] = Stage("retrofit", (), settings, Method(name, last))
    for method in pipeline.methods():
        trained = method.name in pipeline.variants
        needs = (f"retrofit-{method.name}",) if trained else ()
        if trained:
            _add(found, "held-out", method, needs, {"documents": profile.held_out, "seed": pipeline.seed})
        settings = {"problems": profile.problems, "chains": profile.chains, "length": max(profile.lengths)}
        settings |= {"seed": pipeline.seed} if trained else {"seed": pipeline.seed, "dms": asdict(profile.dms)}
        _add(found, "records", method, needs, settings)
    settings = {"lengths": list(profile.lengths), "widths": list(profile.widths)}
    found["summary"] = Stage("summary", tuple(found), settings)
    return found


def run_stage(pipeline: Pipeline, name: str, code: str = "") -> dict:
    """Run one stage, or read what is there of it; the stages that it needs are run, too, unless they are there.

    code: a digest of the sources that shape this stage, or "" for whatever they were.  Results that were begun with
    another digest are deleted first.  Returns {"stage", "seconds", "result"}.  Raises ValueError for an unknown name.
    """
    known = stages(pipeline)
    if name not in known:
        raise ValueError(f"stage {name!r}: must be one of {', '.join(known)}")
    began, stage = time.time(), known[name]
    if code:
        _keep_only(pipeline, name, stage, code)
    return {"stage": name, "result": _run(pipeline, stage), "seconds": round(time.time() - began, 1)}


def _add(found: dict, kind: str, method: Method, needs: tuple, settings: dict) -> None:
    found[f"{kind}-{method.name}-cr{method.cr:g}"] = Stage(kind, needs, settings, method)


def _run(pipeline: Pipeline, stage: Stage) -> dict:
    if stage.kind == "retrofit":
        return pipeline.retrofit(stage.method.name)
    if stage.kind == "held-out":
        return pipeline.held_out(stage.method.name, stage.method.cr)
    if stage.kind == "summary":
        return pipeline.summary()
    records = pipeline.records(stage.method)
    right = sum(record["answer"] == record["gold"] for record in records)
    return {"chains": len(records), "right": right, "tokens": sum(record["tokens"] for record in records)}


def _keep_only(pipeline: Pipeline, name: str, stage: Stage, code: str) -> None:
    """Delete what other sources have made of this stage, and note whose results come next."""
    note = pipeline.root / "stages" / f"{name}.code"
    if note.exists() and note.read_text() != code:
        for path in _kept(pipeline, stage):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    note.parent.mkdir(parents=True, exist_ok=True)
    note.write_text(code)


def _kept(pipeline: Pipeline, stage: Stage) -> list[Path]:
    """Where the stage's results are.  A summary is computed anew each time."""
    method = stage.method
    if stage.kind == "retrofit":
        directory = pipeline.checkpoint(method.name, method.cr).parent
        return [directory] if directory.exists() else []
    if stage.kind == "held-out":
        return list(pipeline.checkpoint(method.name, method.cr).glob("held_out-*.json"))
    if stage.kind == "records":
        return list((pipeline.root / "records").glob(f"{method.name}-cr{method.cr:g}-*.jsonl"))
    return []
