"""The stages of the main job: retrofit, measure, sample, summarise.

Each stage keeps its result in the run directory under a name that carries a hash of what it depends on: a second
call reads it, an interrupted one goes on, a changed parameter starts anew beside the old.
"""

import hashlib
import json
import time
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path

import numpy as np

from companion.experiments.heldout import held_out
from companion.experiments.profiles import Profile
from companion.paths import REASONER
from companion.provenance import describe
from companion.records import Method, model_fingerprint, run_grid
from companion.tasks.dataset import TraceDataset
from companion.tasks.program_traces import ProgramTraces
from companion.tasks.reasoner import load_tokenizer
from dms_core.baselines import Baseline, Quest, get_baseline
from dms_core.budgets.curves import summarise
from dms_core.checkpoint import load_base, load_model
from dms_core.config import DMSConfig
from dms_core.model import attach
from dms_core.sampling import SamplingConfig
from dms_core.train.retrofit import RetrofitConfig, checkpoint_dir, retrofit

GRID_BASELINES = ("tova", "h2o", "quest", "streaming-llm")
QUEST_PAGE = 8  # tokens; the paper's 16 are a sixth of the embedded model's prompts


@dataclass(frozen=True)
class Variant:
    """A retrofit of the base model: its method name, gate settings and recipe."""

    method: str
    dms: DMSConfig
    recipe: RetrofitConfig


class Pipeline:
    """The main job of one profile in one run directory."""

    aggregate, label = "vote", "this book"  # how W chains count; what its curves are called

    def __init__(self, profile: Profile, root: Path | str, base: Path | str = REASONER, seed: int = 0) -> None:
        self.profile, self.root, self.base, self.seed = profile, Path(root), Path(base), seed
        self.tokenizer = load_tokenizer(base)
        recipe = replace(profile.recipe, seed=seed)
        immediate = replace(profile.dms, eviction="immediate")
        self.variants = {
            "dms": Variant("dms", profile.dms, recipe),
            "dms-immediate": Variant("dms-immediate", immediate, replace(recipe, stop_cr=profile.compare_cr)),
        }

    @cached_property
    def base_fingerprint(self) -> str:
        return model_fingerprint(load_base(self.base))

    # Retrofit.

    def retrofit(self, method: str = "dms") -> dict:
        """Train a variant, or read what was trained: steps, seconds, the log, and the compression on held-out data."""
        variant = self.variants[method]
        out = self._retrofit_dir(variant)
        if not (out / "retrofit.json").exists():
            out.mkdir(parents=True, exist_ok=True)
            recipe = variant.recipe
            data = TraceDataset(self.tokenizer, recipe.steps * recipe.batch, recipe.batch, seed=recipe.seed)
            began = time.time()
            retrofit(
                load_base(self.base), self.tokenizer, data, variant.dms, recipe, out,
                train_sampling_strategy="sequential", use_cpu=True,
            )  # fmt: skip
            self._note(out / "retrofit.json", seconds=time.time() - began)
        return json.loads((out / "retrofit.json").read_text())

    def checkpoint(self, method: str, cr: float) -> Path:
        return checkpoint_dir(self._retrofit_dir(self.variants[method]), cr)

    def held_out(self, method: str, cr: float) -> dict:
        """Compression, retention per head, KL and agreement of a checkpoint on validation documents."""
        file = self.checkpoint(method, cr) / f"held_out-{self.profile.held_out}.json"
        if not file.exists():
            documents = TraceDataset(self.tokenizer, self.profile.held_out, 1, "validation", self.seed)
            documents = [documents[i] for i in range(len(documents))]
            pad = self.tokenizer.pad_token_id
            facts = held_out(load_model(self.checkpoint(method, cr)), load_base(self.base), documents, pad)
            file.write_text(json.dumps(facts, indent=1) + "\n")
        return json.loads(file.read_text())

    # Sampling.

    def methods(self) -> list[Method]:
        compared = [Method("dms", cr) for cr in self.profile.crs]
        return [Method("vanilla", 1.0), *compared, Method("dms-immediate", self.profile.compare_cr)]

    def grid_methods(self) -> list[Method]:
        """``methods`` and the training-free ones at the same compression ratios."""
        return [*self.methods(), *(Method(name, cr) for name in GRID_BASELINES for cr in self.profile.crs)]

    def records(self, method: Method) -> list[dict]:
        """Chain records of one method on the held-out test problems."""
        profile = self.profile
        task = ProgramTraces(size=profile.problems, split="test", seed=self.seed)
        config = SamplingConfig(max_new_tokens=max(profile.lengths), batch=profile.batch, seed=self.seed)
        return run_grid(
            self._model(method), self.tokenizer, task, method, profile.chains, config, self.root / "records",
            self._baseline(method),
        )  # fmt: skip

    def right(self, method: Method) -> np.ndarray:
        """For each test problem the share of its chains, at the largest L, with the right answer: (P,)."""
        right = np.zeros(self.profile.problems)
        for record in self.records(method):
            right[record["problem"]] += record["correct"] / self.profile.chains
        return right

    def run(self) -> dict:
        """Every stage in order; returns the summary."""
        for method in self.variants:
            self.retrofit(method)
        return self.summary()

    def summary(self) -> dict:
        """Points, margins and paired differences of everything sampled; also written to curves.json."""
        records = [record for method in self.methods() for record in self.records(method)]
        summary = summarise(records, list(self.profile.lengths), list(self.profile.widths))
        facts = self.retrofit("dms")
        final = self.held_out("dms", self.profile.recipe.final_cr)
        summary["retrofit"] = {
            "steps": facts["recipe"]["steps"], "seconds": round(facts["seconds"], 1),
            "cr_target": self.profile.recipe.final_cr,
            "cr_measured": final["cr_decisions"], "cr_live": final["cr_live"],
        }  # fmt: skip
        summary["held_out"] = {f"{m.name}-cr{m.cr:g}": self.held_out(m.name, m.cr) for m in self.methods()[1:]}
        summary["profile"], summary["environment"] = asdict(self.profile), describe()
        (self.root / "curves.json").write_text(json.dumps(summary, indent=1) + "\n")
        return summary

    def grid(self) -> dict:
        """``summary``'s points, margins and differences with the training-free methods; also written to grid.json.

        What is not there yet is trained and sampled.
        """
        began = time.time()
        records = [record for method in self.grid_methods() for record in self.records(method)]
        summary = summarise(records, list(self.profile.lengths), list(self.profile.widths))
        summary |= {
            "profile": asdict(self.profile),
            "environment": describe(),
            "seconds": round(time.time() - began, 1),
        }
        (self.root / "grid.json").write_text(json.dumps(summary, indent=1) + "\n")
        return summary

    def _baseline(self, method: Method) -> Baseline | None:
        """Settings of a training-free method; None for the others."""
        if method.name not in GRID_BASELINES:
            return None
        return Quest(method.cr, page=QUEST_PAGE) if method.name == "quest" else get_baseline(method.name)(method.cr)

    def _model(self, method: Method):
        if method.name == "vanilla" or self._baseline(method):
            return attach(load_base(self.base), self.profile.dms)  # gates stay off; the same cache and counters
        self.retrofit(method.name)
        return load_model(self.checkpoint(method.name, method.cr))

    def parameters(self) -> int:
        """Weights of the base model."""
        return load_base(self.base).num_parameters()

    def _retrofit_dir(self, variant: Variant) -> Path:
        facts = [asdict(variant), self.base_fingerprint]
        return self.root / f"{variant.method}-{hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:8]}"

    @staticmethod
    def _note(file: Path, **facts) -> None:
        file.write_text(json.dumps({**json.loads(file.read_text()), **facts}, indent=1) + "\n")
