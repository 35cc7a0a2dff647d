"""Chains as records: one JSONL line a chain, written as it ends.

One generation at the largest L and W serves every smaller budget (paper section 5.1).  Not so for the training-free
methods: their KV budget is (prompt + L) / CR, so a chain serves its own L alone, its "budget_length".

A file's name carries a hash of everything that shapes a chain, so an interrupted run goes on where it stopped and a
changed parameter never mixes with old lines.
"""

import contextlib
import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path

from tqdm import tqdm

from companion.tasks.base import Task, decode
from dms_core.baselines import Baseline
from dms_core.sampling import Chain, SamplingConfig, sample_chains
from dms_core.storage import JsonlWriter, read_jsonl


@dataclass(frozen=True)
class Method:
    """What is measured: its name in every table and figure, and its target compression ratio."""

    name: str  # vanilla, dms, dms-immediate, tova, ...
    cr: float

    def __str__(self) -> str:
        return f"{self.name}-cr{self.cr:g}"


def records_file(
    model, weights: str, tokenizer, task: Task, method: Method, config: SamplingConfig, baseline: Baseline | None
) -> str:
    """The name of the file for these chains.

    weights: what tells the model's weights from others', such as ``dms_core.checkpoint.fingerprint``.
    """
    settings = {k: v for k, v in asdict(config).items() if k not in ("batch", "page")}
    dms = None if method.name == "vanilla" or baseline else model.dms.config.to_dict()
    asked = [[problem.id, problem.gold, list(task.prompt_ids(tokenizer, problem))] for problem in task.problems]
    facts = [weights, asdict(method), settings, dms, task.name, task.version, asked]
    facts += [baseline.settings()] if baseline else []
    key = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:12]
    return f"{method}-{key}.jsonl"


def sample_records(
    model,
    tokenizer,
    task: Task,
    method: Method,
    chains: int,
    config: SamplingConfig,
    file: Path,
    baseline: Baseline | None = None,
) -> list[dict]:
    """Sample ``chains`` chains a problem and return their records, those already in ``file`` included.

    ``model`` has DMS gates; for ``vanilla`` and with a ``baseline`` they are switched off.  Where the task grades
    later, ``correct`` is None.  Raises ValueError for chains below 1.
    """
    if chains < 1:
        raise ValueError(f"chains {chains}: must be >= 1")
    task.ready()
    mark = {"budget_length": config.max_new_tokens} if baseline else {}
    records = {(r["problem"], r["chain"]): r | mark for r in read_jsonl(file)}
    wanted = [(p, c) for p in range(len(task.problems)) for c in range(chains)]
    jobs = [job for job in wanted if job not in records]
    prompts = [task.prompt_ids(tokenizer, problem) for problem in task.problems]
    gates = model.dms.disabled() if method.name == "vanilla" or baseline else contextlib.nullcontext()
    label = f"{method.name} CR{method.cr:g}"
    with gates, JsonlWriter(file) as log, tqdm(total=len(jobs), desc=label, unit="chain", mininterval=2) as bar:
        for chain in sample_chains(model, tokenizer, prompts, jobs, config, baseline):
            records[chain.problem, chain.chain] = record = make_record(chain, task, method, tokenizer, config) | mark
            log.write(record)
            bar.update()
    return [records[job] for job in wanted]


def make_record(chain: Chain, task: Task, method: Method, tokenizer, config: SamplingConfig) -> dict:
    """One JSONL line: answer, whether it is right, when it was complete, and budgets (see sampling.Chain)."""
    problem = task.problems[chain.problem]
    text = decode(tokenizer, chain.tokens)
    answer = task.extract(text)
    return {
        "task": task.name,
        "id": problem.id,
        "method": method.name,
        "cr": method.cr,
        "problem": chain.problem,
        "chain": chain.chain,
        "answer": answer,
        "gold": problem.gold,
        "correct": None if task.grades_later else task.grade(answer, problem),
        **problem.metadata,
        "finished_at": task.complete_at(chain.tokens, tokenizer),
        "tokens": len(chain.tokens) + chain.finished,
        "stride": config.stride,
        "live": [round(x, 3) for x in chain.live],
        "reads": [round(x, 1) for x in chain.reads],
        "prompt_tokens": chain.prompt_tokens,
        "prompt_live": round(chain.live[0], 3),
        "text": text if task.keeps_text else None,
    }
