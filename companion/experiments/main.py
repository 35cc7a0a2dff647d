"""The main job, a function a stage: retrofit → held out → records → summary.

Each stage keeps its result in the run's directory under a name that carries a hash of what it depends on: a second
call reads it, an interrupted one goes on, a changed parameter starts anew beside the old.  A study is a ``Run`` of its
own: other variants, other profile, the same functions.
"""

import hashlib
import json
import shutil
import time
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import numpy as np

from companion.experiments.embedded import train_recipe
from companion.experiments.heldout import held_out as measure
from companion.experiments.profiles import Profile, get_profile
from companion.experiments.sample import checked_device, load_tokenizer
from companion.paths import REASONER
from companion.provenance import describe
from companion.records import Method, records_file, sample_records
from companion.tasks import Task
from companion.tasks.grading import canonical, grade_file
from companion.tasks.program_traces import ProgramTraces, TraceDataset
from dms_core.baselines import Baseline, Quest, get_baseline
from dms_core.budgets.curves import summarise
from dms_core.checkpoint import fingerprint, load_base, load_model
from dms_core.config import DMSConfig
from dms_core.model import attach
from dms_core.sampling import SamplingConfig
from dms_core.storage import read_json, update_json, write_json, write_text
from dms_core.train.recipe import Recipe
from dms_core.train.trainer import checkpoint_dir

GRID_BASELINES = ("tova", "h2o", "quest", "streaming-llm")
QUEST_PAGE = 8  # tokens; the paper's 16 are a sixth of the embedded model's prompts


@dataclass(frozen=True)
class Run:
    """A dense model, retrofits of it, and a task, with one directory for all results."""

    profile: Profile
    root: Path
    base: Path = REASONER  # directory of the dense model
    seed: int = 0
    variants: dict[str, Recipe] | None = None  # retrofits that are trained here, by method; None: the main job's
    checkpoints: dict[float, Path] = field(default_factory=dict)  # retrofits made elsewhere, by compression ratio
    benchmark: Task | None = None  # None: program traces
    label: str = "this book"  # what its curves are called
    device: str | None = None  # where models train and run; None: a GPU where there is one

    def __post_init__(self) -> None:
        for name in ("root", "base"):
            object.__setattr__(self, name, Path(getattr(self, name)))
        if self.variants is None:
            object.__setattr__(self, "variants", main_variants(self.profile, self.seed))

    @classmethod
    def of(cls, profile: str, runs: Path, seed: int = 0, device: str | None = None) -> "Run":
        """The main job of a profile below ``runs``."""
        return cls(get_profile(profile), Path(runs) / profile, seed=seed, device=device)

    @cached_property
    def task(self) -> Task:
        return self.benchmark or ProgramTraces(size=self.profile.problems, split="test", seed=self.seed)

    @cached_property
    def place(self) -> str:
        """The device.  Raises ValueError for one that this machine lacks."""
        return checked_device(self.device)

    @cached_property
    def tokenizer(self):
        return load_tokenizer(self.base)

    @cached_property
    def base_weights(self) -> str:
        return fingerprint(self.base)

    def parameters(self) -> int:
        """Weights of the dense model."""
        return load_base(self.base).num_parameters()


def main_variants(profile: Profile, seed: int) -> dict[str, Recipe]:
    """Delayed and immediate eviction; the latter up to the ratio at which they are compared."""
    if profile.recipe is None:
        return {}
    delayed = profile.recipe.changed("dms", retrofit={"seed": seed})
    stop = {"stop_cr": profile.compare_cr}
    return {
        "dms": delayed,
        "dms-immediate": delayed.changed("dms-immediate", dms={"eviction": "immediate"}, retrofit=stop),
    }


# Retrofit.


def retrofit(run: Run, name: str = "dms") -> dict:
    """Train a variant, or read what was trained: recipe, steps, seconds and the log."""
    out = _retrofit_dir(run, name)
    if not (out / "retrofit.json").exists():
        began = time.time()
        train_recipe(run.variants[name], out, cpu=run.place == "cpu", base=run.base)
        update_json(out / "retrofit.json", seconds=time.time() - began)
    return read_json(out / "retrofit.json")


def checkpoint(run: Run, name: str, cr: float) -> Path:
    """Where the checkpoint of a variant at a compression ratio is, or will be."""
    return run.checkpoints[cr] if run.checkpoints else checkpoint_dir(_retrofit_dir(run, name), cr)


def held_out(run: Run, name: str, cr: float) -> dict:
    """Compression, retention per head, KL and agreement of a checkpoint on validation documents."""
    file = checkpoint(run, name, cr) / f"held_out-{run.profile.held_out}.json"
    if not file.exists():
        documents = TraceDataset(run.tokenizer, run.profile.held_out, 1, "validation", run.seed)
        model, teacher = (x.to(run.place) for x in (load_model(checkpoint(run, name, cr)), load_base(run.base)))
        write_json(file, measure(model, teacher, documents, run.tokenizer.pad_token_id))
    return read_json(file)


def _retrofit_dir(run: Run, name: str) -> Path:
    facts = [run.variants[name].to_dict(), run.base_weights]
    return run.root / f"{name}-{hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:8]}"


# Sampling.


def methods(run: Run) -> list[Method]:
    """The dense model, its retrofits at each ratio and, in the main job, immediate eviction."""
    compared = [Method("vanilla", 1.0), *(Method("dms", cr) for cr in run.profile.crs)]
    return compared + [Method("dms-immediate", run.profile.compare_cr)] * ("dms-immediate" in run.variants)


def grid_methods(run: Run) -> list[Method]:
    """``methods`` and the training-free ones at the same compression ratios."""
    return [*methods(run), *(Method(name, cr) for name in GRID_BASELINES for cr in run.profile.crs)]


def records(run: Run, method: Method) -> list[dict]:
    """Graded chain records of one method on the test problems, answers that the grader holds equal spelt alike."""
    profile, baseline = run.profile, _baseline(method)
    config = SamplingConfig(max_new_tokens=max(profile.lengths), batch=profile.batch, seed=run.seed)
    model, weights = _model(run, method)
    name = records_file(model, weights, run.tokenizer, run.task, method, config, baseline)
    file = run.root / "records" / name
    found = sample_records(model, run.tokenizer, run.task, method, profile.chains, config, file, baseline)
    return canonical(grade_file(file, run.task, missing=True) if run.task.grades_later else found)


def right(run: Run, method: Method) -> np.ndarray:
    """For each test problem the share of its chains, at the largest L, with the right answer: (P,)."""
    shares = np.zeros(run.profile.problems)
    for record in records(run, method):
        shares[record["problem"]] += record["correct"] / run.profile.chains
    return shares


def _baseline(method: Method) -> Baseline | None:
    """Settings of a training-free method; None for the others."""
    if method.name not in GRID_BASELINES:
        return None
    return Quest(method.cr, page=QUEST_PAGE) if method.name == "quest" else get_baseline(method.name)(method.cr)


def _model(run: Run, method: Method) -> tuple:
    """(model, what tells its weights from others')."""
    if method.name == "vanilla" or _baseline(method):  # gates stay off; the same cache and counters
        config = run.profile.recipe.dms if run.profile.recipe else DMSConfig()
        model, weights = attach(load_base(run.base), config), run.base_weights
    else:
        if method.name in run.variants:
            retrofit(run, method.name)
        directory = checkpoint(run, method.name, method.cr)
        model, weights = load_model(directory), fingerprint(directory)
    return model.to(run.place), weights


# Summaries.


def run_all(run: Run) -> dict:
    """Every stage in order; returns the summary."""
    for name in run.variants:
        retrofit(run, name)
    return summary(run)


def summary(run: Run) -> dict:
    """Points, margins and paired differences of everything sampled; also written to curves.json."""
    result = _summarised(run, methods(run))
    facts, top = retrofit(run), run.profile.recipe.retrofit.final_cr
    held = {str(method): held_out(run, method.name, method.cr) for method in methods(run)[1:]}
    result["retrofit"] = {
        "steps": facts["recipe"]["steps"],
        "seconds": round(facts["seconds"], 1),
        "cr_target": top,
        "cr_measured": held_out(run, "dms", top)["cr_decisions"],
        "cr_live": held_out(run, "dms", top)["cr_live"],
    }
    result |= {"held_out": held, "profile": run.profile.facts(), "environment": describe()}
    write_json(run.root / "curves.json", result)
    return result


def grid(run: Run) -> dict:
    """``summary``'s points, margins and differences with the training-free methods; also written to grid.json."""
    began = time.time()
    result = _summarised(run, grid_methods(run))
    result |= {"profile": run.profile.facts(), "environment": describe(), "seconds": round(time.time() - began, 1)}
    write_json(run.root / "grid.json", result)
    return result


def _summarised(run: Run, compared: list[Method]) -> dict:
    chains = [record for method in compared for record in records(run, method)]
    lengths, widths = list(run.profile.lengths), list(run.profile.widths)
    return summarise(chains, lengths, widths, aggregate=run.task.aggregate)


# Stages by name, for batch runs.


def stage_needs(run: Run) -> dict[str, list[str]]:
    """retrofit-METHOD, records-METHOD-crN, held-out-METHOD-crN and summary, with the stages that each needs."""
    needs = {f"retrofit-{name}": [] for name in run.variants}
    trained = {method: [f"retrofit-{method.name}"] * (method.name in run.variants) for method in methods(run)}
    needs |= {f"records-{method}": needed for method, needed in trained.items()}
    needs |= {f"held-out-{method}": needed for method, needed in trained.items() if needed}
    return {**needs, "summary": list(needs)}


def stage_names(run: Run) -> list[str]:
    """The stages, each after those that it needs."""
    return list(stage_needs(run))


def stage(run: Run, name: str, code: str = "") -> dict:
    """Run one stage, or read what is there of it, as all functions here do: {"stage", "seconds", "result"}.

    code: a digest of the sources that shape this stage, or "" for whatever they were.  What was begun with another
    digest is deleted first, since names of kept results tell settings but not code.  ValueError for an unknown name.
    """
    if name not in stage_names(run):
        raise ValueError(f"stage {name!r}: must be one of {', '.join(stage_names(run))}")
    began = time.time()
    kind = next(kind for kind in ("retrofit", "held-out", "records", "summary") if name.startswith(kind))
    method = next((m for m in methods(run) if name == f"{kind}-{m}"), None)
    note = run.root / "stages" / f"{name}.code"
    if code and note.exists() and note.read_text() != code:
        _forget(run, kind, method or name.removeprefix("retrofit-"))
    if code:
        write_text(note, code)
    if kind == "retrofit":
        result = retrofit(run, name.removeprefix("retrofit-"))
    elif kind == "held-out":
        result = held_out(run, method.name, method.cr)
    elif kind == "summary":
        result = summary(run)
    else:
        found = records(run, method)
        facts = {"right": sum(r["answer"] == r["gold"] for r in found), "tokens": sum(r["tokens"] for r in found)}
        result = {"chains": len(found), **facts}
    return {"stage": name, "result": result, "seconds": round(time.time() - began, 1)}


def _forget(run: Run, kind: str, method: Method | str) -> None:
    """Delete what a stage keeps.  A summary is computed anew each time."""
    if kind == "retrofit":
        shutil.rmtree(_retrofit_dir(run, method), ignore_errors=True)
    elif kind == "held-out":
        for file in checkpoint(run, method.name, method.cr).glob("held_out-*.json"):
            file.unlink()
    elif kind == "records":
        for file in (run.root / "records").glob(f"{method}-*.jsonl"):
            file.unlink()
