"""Chains as records: one JSONL line a chain, written as it ends.

One generation at the largest L and W serves every smaller budget (paper section 5.1).  Not so for the training-free
methods: their KV budget is (prompt + L) / CR, so a chain serves its own L alone, its "budget_length".

A file's name carries a hash of everything that shapes a chain, so an interrupted run goes on where it stopped and a
changed parameter never mixes with old lines.  Chains do not depend on each other: shards of them, on as many cards,
write a file each beside it, and all these files together are the records.
"""

import contextlib
import hashlib
import json
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

from tqdm import tqdm

from companion.method import Method
from companion.shards import WHOLE, Shard, record_files
from companion.tasks.base import Task, decode
from dms_core.baselines import Baseline
from dms_core.pick import stop_tokens
from dms_core.sampling import Chain, SamplingConfig, sample_chains
from dms_core.storage import JsonlWriter, is_written, read_jsonl

# Settings that came later: at these values names are those of before.
LATER = {"top_k": (None,), "min_p": (0.0,), "kv_cache_dtype": ("auto",)}


def records_file(
    model, weights: str, tokenizer, task: Task, method: Method, config: SamplingConfig, baseline: Baseline | None
) -> str:
    """The name of the file for these chains.

    weights: what tells the model's weights from others', such as ``dms_core.checkpoint.fingerprint``.
    """
    settings = {k: v for k, v in asdict(config).items() if k not in ("batch", "page") and LATER.get(k) != (v,)}
    dms = None if method.name == "vanilla" or baseline else model.dms.config.to_dict()
    asked = [[problem.id, problem.gold, list(task.prompt_ids(tokenizer, problem))] for problem in task.problems]
    facts = [weights, {"name": method.name, "cr": method.cr}, settings, dms, task.name, task.version, asked]
    facts += [baseline.settings()] if baseline else []
    facts += [{"template": dict(task.template)}] if task.template else []
    stop = stop_tokens(model, tokenizer)
    facts += [stop] if stop != (tokenizer.eos_token_id,) else []
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
    shard: Shard = WHOLE,
) -> list[dict]:
    """Sample ``chains`` chains a problem, or one shard of them, and return their records, old ones included.

    file: of all shards together; nothing is sampled again that it or a shard's file holds, however they were cut.
    ``model`` has DMS gates; for ``vanilla`` and with a ``baseline`` they are switched off.  If it is split over several
    processes, all call this and the first one writes.  Where the task grades later, ``correct`` is None.  Raises
    ValueError for chains below 1, and while another process writes the same shard, or shards of another number.
    """
    if chains < 1:
        raise ValueError(f"chains {chains}: must be >= 1")
    task.ready()
    mark = {"budget_length": config.max_new_tokens} if baseline else {}
    mark |= {"retrofit_seed": method.seed} if method.seed else {}
    wanted = [(p, c) for p in range(len(task.problems)) for c in range(chains)][shard.index - 1 :: shard.count]
    split = model.dms.split
    prompts = [task.prompt_ids(tokenizer, problem) for problem in task.problems]
    gates = model.dms.disabled() if method.name == "vanilla" or baseline else contextlib.nullcontext()
    label = f"{method.name} CR{method.cr:g}"
    with gates, _writer(file, shard) if split.rank == 0 else contextlib.nullcontext() as log:
        lines = split.share([line for part in record_files(file) for line in read_jsonl(part)])
        records = {(r["problem"], r["chain"]): r | mark for r in lines}
        jobs = [job for job in wanted if job not in records]
        sampled = sample_chains(model, tokenizer, prompts, jobs, config, baseline)
        for chain in tqdm(sampled, label, len(jobs), unit="chain", mininterval=2, disable=split.rank > 0):
            records[chain.problem, chain.chain] = record = make_record(chain, task, method, tokenizer, config) | mark
            if log:
                log.write(record)
    return [records[job] for job in wanted]


@contextlib.contextmanager
def _writer(whole: Path, shard: Shard) -> Iterator[JsonlWriter]:
    """A shard's file, open for writing.  Raises ValueError while others write it, or chains that were cut otherwise."""
    apart = {Shard(index, shard.count).file(whole) for index in range(1, shard.count + 1)}
    with JsonlWriter(shard.file(whole)) as log:  # before it looks: of two that begin at once, one sees the other
        for other in set(record_files(whole)) - apart:
            if is_written(other):
                raise ValueError(f"{other}: another process is writing it, whose chains shard {shard} would repeat")
        yield log


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
        "prompt_kept": round(chain.prompt_kept, 3),
        "text": text if task.keeps_text else None,
    }
