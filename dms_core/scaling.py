"""The W-L-CR grid: one generation at the largest L and W serves every smaller budget (paper section 5.1).

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

from dms_core.baselines import Baseline
from dms_core.sampling import SamplingConfig, sample_chains
from dms_core.tasks.programs import ANSWER_MARK, Problem, extract_answer


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
    model,
    tokenizer,
    problems: Sequence[Problem],
    method: Method,
    chains: int,
    config: SamplingConfig,
    out: Path | str,
    make_cache: Baseline | None = None,
) -> list[dict]:
    """Sample ``chains`` chains a problem and return their records, those already in ``out`` included.

    ``model`` has DMS gates; for ``vanilla`` and with a baseline's ``make_cache`` they are switched off.
    """
    if chains < 1:
        raise ValueError(f"chains {chains}: must be >= 1")
    file = Path(out) / f"{method.name}-cr{method.cr:g}-{grid_key(model, problems, method, config, make_cache)}.jsonl"
    file.parent.mkdir(parents=True, exist_ok=True)
    records = {(r["problem"], r["chain"]): r for r in read_records(file)}
    jobs = [(p, c) for p in range(len(problems)) for c in range(chains) if (p, c) not in records]
    prompts = [tokenizer(problem.prompt)["input_ids"] for problem in problems]
    gates = model.dms.disabled() if method.name == "vanilla" or make_cache else contextlib.nullcontext()
    label = f"{method.name} CR{method.cr:g}"
    with gates, file.open("a") as log, tqdm(total=len(jobs), desc=label, unit="chain", mininterval=2) as bar:
        for chain in sample_chains(model, tokenizer, prompts, jobs, config, make_cache):
            record = make_record(chain, problems[chain.problem], method, tokenizer, config.stride)
            log.write(json.dumps(record) + "\n")
            log.flush()
            records[chain.problem, chain.chain] = record
            bar.update()
    return [records[p, c] for p in range(len(problems)) for c in range(chains)]


def grid_key(
    model, problems: Sequence[Problem], method: Method, config: SamplingConfig, make_cache: Baseline | None = None
) -> str:
    """Hash of model, problems, method and everything in the sampling settings that shapes a chain."""
    settings = {k: v for k, v in asdict(config).items() if k not in ("batch", "page")}
    dms = None if method.name == "vanilla" or make_cache else model.dms.config.to_dict()
    facts = [model_fingerprint(model), asdict(method), settings, dms, [p.prompt for p in problems]]
    if make_cache:
        facts.append(make_cache.settings())
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:12]


def make_record(chain, problem: Problem, method: Method, tokenizer, stride: int) -> dict:
    """One JSONL line: answer, when it was complete, and budgets (see sampling.Chain)."""
    text = tokenizer.decode(chain.tokens)
    answer = extract_answer(text)
    made = len(chain.tokens) + chain.finished
    mark = tokenizer.convert_tokens_to_ids(ANSWER_MARK)
    return {
        "method": method.name, "cr": method.cr, "problem": chain.problem, "chain": chain.chain, "answer": answer,
        "gold": problem.answer, "variables": problem.variables,
        "finished_at": None if answer is None else chain.tokens.index(mark) + 2, "tokens": made, "stride": stride,
        "live": [round(x, 3) for x in chain.live], "reads": [round(x, 1) for x in chain.reads],
        "prompt_tokens": chain.prompt_tokens, "prompt_live": round(chain.live[0], 3), "text": text,
    }  # fmt: skip


def read_records(file: Path) -> list[dict]:
    """The whole lines of a record file; a last line cut short by an interruption is dropped from the file."""
    if not file.exists():
        return []
    text = file.read_text()
    whole = text[: text.rfind("\n") + 1]
    if whole != text:
        file.write_text(whole)
    return [json.loads(line) for line in whole.splitlines()]
