"""The W-L-CR grid: one generation at the largest L and W serves every smaller budget (paper section 5.1).

Not so for the baselines: their KV budget is (prompt + L) / CR, so a chain serves its own L alone, its "budget_length".

One JSONL line a chain, written as it ends.  A file's name carries a hash of everything that matters, so an
interrupted run goes on where it stopped and a changed parameter never mixes with old lines.
"""

import contextlib
import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from tqdm import tqdm

from companion.tasks.base import Task, TaskProblem, decode
from dms_core.baselines import Baseline
from dms_core.sampling import SamplingConfig, sample_chains


@dataclass(frozen=True)
class Method:
    """What is measured: its name in every table and figure, and its target compression ratio."""

    name: str  # vanilla, dms, dms-immediate, ...
    cr: float


def model_fingerprint(model) -> str:
    """A hash of all weights."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().float().cpu().numpy().tobytes())
    return digest.hexdigest()[:16]


def run_grid(
    model, tokenizer, task: Task, method: Method, chains: int, config: SamplingConfig, out: Path | str,
    make_cache: Baseline | None = None,
) -> list[dict]:  # fmt: skip
    """Sample ``chains`` chains a problem and return their records, those already in ``out`` included.

    ``model`` has DMS gates; for ``vanilla`` and with a baseline's ``make_cache`` they are switched off.  Where the task
    grades later, ``correct`` is None.
    out: a directory, or the very file, as ``grid_file`` names it.
    """
    if chains < 1:
        raise ValueError(f"chains {chains}: must be >= 1")
    task.ready()
    out, problems = Path(out), task.problems
    file = out if out.suffix == ".jsonl" else grid_file(model, tokenizer, task, method, config, out, make_cache)
    file.parent.mkdir(parents=True, exist_ok=True)
    mark = _budget_length(config, make_cache)  # records from before there was such a mark get it here
    records = {(r["problem"], r["chain"]): r | mark for r in read_records(file)}
    jobs = [(p, c) for p in range(len(problems)) for c in range(chains) if (p, c) not in records]
    prompts = [task.prompt_ids(tokenizer, problem) for problem in problems]
    gates = model.dms.disabled() if method.name == "vanilla" or make_cache else contextlib.nullcontext()
    label = f"{method.name} CR{method.cr:g}"
    with gates, file.open("a") as log, tqdm(total=len(jobs), desc=label, unit="chain", mininterval=2) as bar:
        for chain in sample_chains(model, tokenizer, prompts, jobs, config, make_cache):
            record = make_record(chain, task, method, tokenizer, config, make_cache)
            log.write(json.dumps(record) + "\n")
            log.flush()
            records[chain.problem, chain.chain] = record
            bar.update()
    return [records[p, c] for p in range(len(problems)) for c in range(chains)]


def grid_file(
    model, tokenizer, task: Task, method: Method, config: SamplingConfig, out: Path | str,
    make_cache: Baseline | None = None,
) -> Path:  # fmt: skip
    """Where the records of this grid are kept under ``out``."""
    prompts = [task.prompt_ids(tokenizer, problem) for problem in task.problems]
    key = grid_key(model, task, prompts, method, config, make_cache)
    return Path(out) / f"{method.name}-cr{method.cr:g}-{key}.jsonl"


def grid_key(
    model, task: Task, prompts: Sequence[Sequence[int]], method: Method, config: SamplingConfig,
    make_cache: Baseline | None = None,
) -> str:  # fmt: skip
    """Hash of model, task, problems, prompts, method and everything in the sampling settings that shapes a chain."""
    settings = {k: v for k, v in asdict(config).items() if k not in ("batch", "page")}
    dms = None if method.name == "vanilla" or make_cache else model.dms.config.to_dict()
    asked = [[problem.id, problem.gold, list(ids)] for problem, ids in zip(task.problems, prompts, strict=True)]
    facts = [model_fingerprint(model), asdict(method), settings, dms, task.name, task.version, asked]
    if make_cache:
        facts.append(make_cache.settings())
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:12]


def make_record(
    chain, task: Task, method: Method, tokenizer, config: SamplingConfig, make_cache: Baseline | None = None
) -> dict:
    """One JSONL line: answer, whether it is right, when it was complete, and budgets (see sampling.Chain).

    With a baseline's ``make_cache`` also "budget_length", the L that its KV budget was set for.
    """
    problem: TaskProblem = task.problems[chain.problem]
    text = decode(tokenizer, chain.tokens)
    answer = task.extract(text)
    return {
        "task": task.name, "id": problem.id, "method": method.name, "cr": method.cr, "problem": chain.problem,
        "chain": chain.chain, "answer": answer, "gold": problem.gold,
        "correct": None if task.grades_later else task.grade(answer, problem), **problem.metadata,
        "finished_at": task.complete_at(chain.tokens, tokenizer), "tokens": len(chain.tokens) + chain.finished,
        "stride": config.stride, "live": [round(x, 3) for x in chain.live], "reads": [round(x, 1) for x in chain.reads],
        "prompt_tokens": chain.prompt_tokens, "prompt_live": round(chain.live[0], 3),
        "text": text if task.keeps_text else None, **_budget_length(config, make_cache),
    }  # fmt: skip


def _budget_length(config: SamplingConfig, make_cache: Baseline | None) -> dict:
    return {"budget_length": config.max_new_tokens} if make_cache else {}


def read_records(file: Path) -> list[dict]:
    """The whole lines of a record file; a last line cut short by an interruption is dropped from the file."""
    if not file.exists():
        return []
    text = file.read_text()
    whole = text[: text.rfind("\n") + 1]
    if whole != text:
        file.write_text(whole)
    return [json.loads(line) for line in whole.splitlines()]
