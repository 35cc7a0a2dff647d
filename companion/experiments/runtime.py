"""The third axis: seconds of generation, dense against DMS, at the largest batch that a stated cache memory holds.

The dense model runs with transformers' own cache and attention (``dense_rows``), DMS from its checkpoints, both with
the same continuous batching.  A chain's seconds are its share of every step that it takes part in: a method whose rows
are small decodes more of them together, and each becomes cheaper.  They are cut at L as reads are; the batch is that of
the largest L, although more rows of fewer tokens would fit.

A row is charged the keys and values at its chain's peak, in all layers and heads: the quantile ``HELD`` over chains of
an untimed pilot, by the same rule for each method.  What else lies in memory, such as a page's empty slots or the
columns that a DynamicCache, a rectangle, has before a short row, is not charged.

Problems are cut into blocks, which should hold several times the largest batch, since rows stand empty at a block's
end.  Within a block the methods take turns, a chain at a time, so that a slow minute of the machine meets them all.  A
block's records are written when all have ended; an interrupted run goes on with the next.
"""

import hashlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from tqdm import tqdm

from companion.experiments import main as job
from companion.experiments.dense_rows import sample_dense
from companion.experiments.run import Run
from companion.experiments.summaries import merged
from companion.method import Method
from companion.provenance import describe
from companion.records import make_record, records_file
from companion.tasks import Task
from companion.tasks.grading import canonical
from dms_core.budgets.curves import summarise
from dms_core.sampling import Chain, SamplingConfig, sample_chains
from dms_core.storage import JsonlWriter, read_json, read_jsonl, write_json

HELD = 0.95  # share of the chains whose peak is within what a row is charged
UNITS = {"": 1, "k": 10**3, "M": 10**6, "G": 10**9, "Ki": 2**10, "Mi": 2**20, "Gi": 2**30}


@dataclass(frozen=True)
class Plan:
    """What is measured, besides the models."""

    memory: int  # bytes of keys and values of all rows together
    chains: int  # a problem
    blocks: int = 4  # of problems; fewer where there are not as many problems
    pilot: int = 32  # chains

    def __post_init__(self) -> None:
        for name in ("memory", "chains", "blocks", "pilot"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} {getattr(self, name)}: must be >= 1")


def parse_bytes(text: str) -> int:
    """Bytes of "2MB", "512KiB" or "4096".  Raises ValueError for anything else, and for less than one byte."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?) ?([kMG]|[KMG]i)?B?", text)
    if not found or (size := int(float(found[1]) * UNITS[found[2] or ""])) < 1:
        raise ValueError(f"memory {text}: must be a number of bytes, such as 2MB or 512KiB")
    return size


def measure(
    models: Mapping[Method, tuple[object, str]],
    tokenizer,
    task: Task,
    config: SamplingConfig,
    plan: Plan,
    directory: Path,
) -> dict:
    """Time all chains of all methods; what is there already in ``directory`` is read.

    models: of each method a model with gates (those of ``vanilla`` are switched off), and what tells its weights from
    others'.  config: its batch is replaced.  Returns {"records": chain records, each with "seconds", cumulative as
    "reads" are, and "block"; "methods": of each its "batch", "row_bytes" and "peak_tokens"; "memory"; "machine";
    "files" of the records}.
    Where the task grades later, ``correct`` is None and "files" names what is to be graded.  Raises ValueError where
    another machine began what is not complete, for one model given twice, and for one that is spread over processes.
    """
    if len({id(model) for model, _ in models.values()}) < len(models):
        raise ValueError("models: each method must have one of its own, since gates are on or off in turns")
    if any(model.dms.split.size > 1 for model, _ in models.values()):
        raise ValueError("a model is spread over processes: must be on one")
    task.ready()
    prompts = [task.prompt_ids(tokenizer, problem) for problem in task.problems]
    methods = [_Timed(method, *models[method], tokenizer, task, prompts, config) for method in models]
    shape = [[method.file for method in methods], vars(plan)]
    key = hashlib.sha256(json.dumps(shape, sort_keys=True).encode()).hexdigest()[:12]
    files = {method: directory / f"{Path(method.file).stem}-{key}.jsonl" for method in methods}
    blocks = _blocks(len(prompts), plan)
    lacked = set().union(*(_missing(blocks, files[method]) for method in methods))
    missing = dict.fromkeys(methods, sorted(lacked))  # of a block all methods, or one would have no turns
    facts = _facts(directory / f"runtime-{key}.json", methods, plan, complete=not any(missing.values()))
    batches = {method: facts["methods"][str(method.method)]["batch"] for method in methods}
    todo = sum(len(blocks[number]) for numbers in missing.values() for number in numbers)
    with tqdm(desc="runtime", total=todo, unit="chain", mininterval=2) as bar:
        for number, jobs in enumerate(blocks):
            running = {m: m.sample(jobs, batches[m]) for m in methods if number in missing[m]}
            chains: dict[_Timed, list[Chain]] = {method: [] for method in running}
            for method, chain in _by_turns(running):
                chains[method].append(chain)
                bar.update()
            for method, ended in chains.items():  # graded when the clock stands
                with JsonlWriter(files[method]) as log:
                    for chain in ended:
                        log.write(method.record(chain) | {"block": number})
    records = {(str(m.method), r["problem"], r["chain"]): r for m in methods for r in read_jsonl(files[m])}
    return {**facts, "files": [str(file) for file in files.values()], "records": list(records.values())}


def runtime(run: Run, memory: int, problems: int = 48, blocks: int = 2) -> dict:
    """The dense model and the run's first retrofits timed on all its tasks; also written to runtime.json.

    memory: bytes.  Returns what ``curves.summarise`` does, with the axis "seconds", and "machine", "memory", "batches".
    """
    parts, batches = [], {}
    for one in run.all_tasks:
        profile = replace(one.profile, problems=problems)
        one = replace(one, profile=profile)
        methods = [Method("vanilla", 1.0), *(Method("dms", cr) for cr in profile.crs)]
        config = SamplingConfig(max(profile.lengths), seed=one.seed)
        directory = one.root / "runtime" / one.task.name.replace(":", "-")
        models = {method: job.model_of(one, method) for method in methods}
        found = measure(models, one.tokenizer, one.task, config, Plan(memory, profile.chains, blocks), directory)
        batches[one.task.name] = found["methods"]
        lengths, widths = list(profile.lengths), list(profile.widths)
        parts.append(summarise(canonical(found["records"]), lengths, widths, aggregate=one.task.aggregate))
    machine = "{processor}, {threads} threads".format(**found["machine"]).replace(" 1 threads", " 1 thread")
    result = merged(parts) | {"machine": machine, "memory": memory, "batches": batches, "problems": problems}
    write_json(run.root / "runtime.json", result | {"environment": describe()})
    return result


@dataclass(frozen=True, eq=False)
class _Timed:
    """One method on one task."""

    method: Method
    model: object
    weights: str
    tokenizer: object
    task: Task
    prompts: Sequence[Sequence[int]]
    config: SamplingConfig

    @property
    def file(self) -> str:
        """The name of records of such chains."""
        return records_file(self.model, self.weights, self.tokenizer, self.task, self.method, self.config, None)

    def sample(self, jobs: Sequence[tuple[int, int]], batch: int) -> Iterator[Chain]:
        draw = sample_dense if self.method.name == "vanilla" else sample_chains
        return draw(self.model, self.tokenizer, self.prompts, jobs, replace(self.config, batch=batch))

    def record(self, chain: Chain) -> dict:
        mark = {"retrofit_seed": self.method.seed} if self.method.seed else {}
        seconds = [round(x, 7) for x in chain.seconds]
        return make_record(chain, self.task, self.method, self.tokenizer, self.config) | mark | {"seconds": seconds}

    def token_bytes(self) -> int:
        """Bytes of a token's keys and values, all layers and heads."""
        seen = [attention for attention in self.model.dms.layout.attention if attention]
        return sum(2 * a.heads * a.head_dim for a in seen) * self.model.dtype.itemsize

    def batch_in(self, plan: Plan) -> dict:
        """The batch that the memory holds, from a pilot: chains of problems that lie apart."""
        token = self.token_bytes()
        longest = max(map(len, self.prompts)) + self.config.max_new_tokens
        apart = [(int(p), 0) for p in np.linspace(0, len(self.prompts) - 1, plan.pilot).round()]
        jobs = list(dict.fromkeys(apart))
        jobs += [(p, c) for c in range(1, plan.chains) for p, _ in jobs][: plan.pilot - len(jobs)]
        peaks = [max(chain.live) for chain in self.sample(jobs, max(1, plan.memory // (token * longest)))]
        peak = float(np.quantile(peaks, HELD, method="higher"))
        row = round(token * peak)
        return {"batch": max(1, plan.memory // row), "row_bytes": row, "peak_tokens": round(peak, 2)}


def _blocks(problems: int, plan: Plan) -> list[list[tuple[int, int]]]:
    """The jobs of each block: all chains of neighbouring problems."""
    cuts = np.array_split(np.arange(problems), min(plan.blocks, problems))
    return [[(int(problem), chain) for problem in cut for chain in range(plan.chains)] for cut in cuts]


def _missing(blocks: list[list[tuple[int, int]]], file: Path) -> list[int]:
    """Numbers of the blocks that the file does not hold whole; of such a block everything is sampled again."""
    held = {(record["problem"], record["chain"]) for record in read_jsonl(file)}
    return [number for number, jobs in enumerate(blocks) if not held.issuperset(jobs)]


def _by_turns(running: Mapping[_Timed, Iterator[Chain]]) -> Iterator[tuple[_Timed, Chain]]:
    """(method, chain) as chains end: the method goes on that has the fewest."""
    running, ended = dict(running), dict.fromkeys(running, 0)
    while running:
        method = min(running, key=ended.get)
        if (chain := next(running[method], None)) is None:
            del running[method]
        else:
            ended[method] += 1
            yield method, chain


def _facts(file: Path, methods: list[_Timed], plan: Plan, complete: bool) -> dict:
    """Memory, batches and machine, read or found by pilots; then, if blocks are to come, everything is warm."""
    about = describe()
    machine = {name: about[name] for name in ("processor", "threads", "capability", "device")}
    machine["torch"] = about["packages"]["torch"]
    if not file.exists():
        found = {str(timed.method): timed.batch_in(plan) for timed in tqdm(methods, "pilot", leave=False)}
        write_json(file, {"memory": plan.memory, "methods": found, "machine": machine})
    elif not complete:
        if (begun := read_json(file)["machine"]) != machine:
            raise ValueError(f"{file} was begun on {begun}: must be finished there, or deleted; this is {machine}")
        for timed in methods:
            list(timed.sample([(0, 0)], 1))
    return read_json(file)
