"""Sample chains on a benchmark, grade them, and summarise what was sampled."""

import inspect
import json
from pathlib import Path

from companion.cli.app import arg, at_least_one, command, opt
from dms_core.storage import write_json

SAMPLE = "Sample and grade"
METHODS = (
    "dms; vanilla: gates off; on the original weights h2o, quest, random, rkv, snapkv, streaming-llm, tova; "
    "tova-protected and so on keep the prompt"
)
Task = opt(str, "traces, aime26, hmmt_feb26, math500, ..., reasoning_gym:DATASET")
Source = opt(Path, "a local JSONL file in place of the hub", metavar="FILE")
Limit = opt(int, "the first N problems only", metavar="N")
Options = opt(list[str], "an option of the task, such as seed=1; may be repeated", "--option", metavar="NAME=VALUE")
Unsafe = opt(bool, "where there is no sandbox, run what the model wrote without", "--unsafe-execution")
Workers = opt(int, "programs graded at once")


def parse_options(texts: list[str], flag: str = "--option") -> dict:
    """NAME=VALUE texts after ``flag``; a value is JSON, or else text."""
    options = {}
    for text in texts:
        name, equals, value = text.partition("=")
        if not equals:
            raise ValueError(f"{flag} {text}: must be NAME=VALUE")
        try:
            options[name] = json.loads(value)
        except ValueError:
            options[name] = value
    return options


def _load_task(name: str, source: Path | None, limit: int | None, options: dict, unsafe: bool):
    """``tasks.get_task``; unsafe: run programs without a sandbox, if it is a task that runs any."""
    from companion.tasks import get_task, task_class

    if unsafe and "unsafe" in inspect.signature(task_class(name)).parameters:
        options = {**options, "unsafe": True}
    return get_task(name, source, limit, **options)


@command(SAMPLE, "sample")
def sample(
    model: opt(str, "a directory or a hub id; for dms a retrofitted model"),
    task: Task,
    method: opt(str, METHODS),
    length: opt(int, "most generated tokens a chain", metavar="L"),
    out: opt(Path, "directory for run.json and records/", metavar="DIR"),
    source: Source = None,
    limit: Limit = None,
    option: Options = (),
    unsafe: Unsafe = False,
    workers: Workers = 1,
    template: opt(
        list[str], "an argument of the chat template, such as enable_thinking=false", metavar="NAME=VALUE"
    ) = (),
    gates: opt(
        str, "to load on the model: gates, and adapters with them; with vanilla the gates stay off", metavar="DIR"
    ) = None,
    cr: opt(float, "compression ratio (default: the checkpoint's)") = None,
    chains: opt(int, "chains a problem", metavar="W") = 1,
    lengths: opt(list[int], "budgets of the curves (default: L/4 .. L)", metavar="L...") = (),
    widths: opt(list[int], "widths of the curves (default: 1, 2, 4 ..)", metavar="W...") = (),
    batch: opt(int, "rows decoded together") = 64,
    temperature: opt(float, "0: the likeliest token") = 0.6,
    top_p: opt(float, "share of the probability that is sampled from") = 0.95,
    top_k: opt(int, "the likeliest tokens that are sampled from (default: all)") = None,
    min_p: opt(float, "least probability of a token, as a share of the likeliest one's") = 0.0,
    seed: opt(int, "of the chains' random streams") = 0,
    kv_cache_dtype: opt(str, "int8: keys and values in 8 bits, with dms and vanilla; auto: as computed") = "auto",
    device: opt(str, "cpu or cuda (default: cuda where there is one); auto: layers over all cards") = None,
    dtype: opt(str, "float32, bfloat16, ...; auto: as saved") = "auto",
    shard: opt(str, "the I-th of N parts of the chains, for a card each: 1/4", metavar="I/N") = "1/1",
):
    """chains of a model on a benchmark, graded; goes on where it was interrupted; under torchrun the model is split"""
    from companion.experiments.sample import ModelSpec, sample_benchmark
    from companion.shards import Shard
    from dms_core.sampling import SamplingConfig

    config = SamplingConfig(
        length, temperature, top_p, batch, seed, top_k=top_k, min_p=min_p, kv_cache_dtype=kv_cache_dtype
    )
    problems = _load_task(task, source, limit, parse_options(option), unsafe)
    problems.template = parse_options(template, "--template")
    spec, part = ModelSpec(model, method, cr, gates, device, dtype), Shard.parse(shard)
    how = {"workers": workers, "unsafe": unsafe, "shard": part}
    result = sample_benchmark(spec, problems, chains, config, out, lengths, widths, **how)
    if row := result["pass_at_1"]:
        whose = "" if part.count == 1 else f"shard {shard} of "
        yield whose + "{method} CR {cr:g}, L {L}: {accuracy:.1f} % over {problems} problems".format(**row)
    return result


@command(SAMPLE, "grade")
def grade(
    records: arg(list[Path], "files of records", "RECORDS.jsonl..."),
    task: Task,
    source: Source = None,
    limit: Limit = None,
    option: Options = (),
    unsafe: Unsafe = False,
    workers: Workers = 1,
    missing: opt(bool, "only records that were never graded", "--missing") = False,
):
    """grade records again, in place"""
    from companion.tasks.grading import grade_file

    problems = _load_task(task, source, limit, parse_options(option), unsafe)
    files = []
    for file in records:
        if not file.exists():
            raise ValueError(f"{file}: no such file")
        graded = grade_file(file, problems, workers, missing)
        files.append({"file": str(file), "records": len(graded), "correct": sum(r["correct"] for r in graded)})
        yield "{file}: {correct} of {records} correct".format(**files[-1])
    return {"task": problems.name, "files": files}


@command(SAMPLE, "eval")
def evaluate(
    model: opt(str, "a directory or hub id: retrofitted by us or the authors, or plain"),
    tasks: opt(str, "names of the harness's tasks, separated by commas"),
    limit: opt(int, "only so many samples of each task") = None,
    include: opt(Path, "a folder with more task files", metavar="DIR") = None,
    tokenizer: opt(str, "a directory or hub id (default: the model's)") = None,
    gates_off: opt(bool, "evict nothing, for comparison", "--gates-off") = False,
    batch_size: opt(int, "requests run together") = 1,
    num_fewshot: opt(int, "examples in the prompt (default: the task's own)") = None,
    apply_chat_template: opt(bool, "put prompts into the chat template", "--apply-chat-template") = False,
    device: opt(str, "cpu, cuda, ... (default: cuda if there is one)") = None,
):
    """run tasks of lm-evaluation-harness on a retrofitted model"""
    at_least_one(limit=limit, batch_size=batch_size)
    if include is not None and not include.is_dir():
        raise ValueError(f"{include}: not a folder")
    try:
        from companion.tasks import lm_eval as harness
    except ImportError as error:
        raise ValueError(str(error)) from None
    from companion.devices import checked_device

    names = [name.strip() for name in tasks.split(",") if name.strip()]
    manager = harness.find_tasks(names, include)
    lm = harness.DMSLM(model, tokenizer, not gates_off, device=checked_device(device), batch_size=batch_size)
    options = {"num_fewshot": num_fewshot, "apply_chat_template": apply_chat_template}
    result = {"model": model, **harness.evaluate(lm, names, manager, limit, **options)}
    yield from eval_lines(result)
    return result


def eval_lines(result: dict):
    """The result in words, one line a metric."""
    for task, metrics in result["results"].items():
        for name, value in metrics.items():
            if isinstance(value, float) and "_stderr" not in name:
                error = metrics.get(name.replace(",", "_stderr,", 1))
                yield f"{task} {name}: {value:.4f}" + (f" ± {error:.4f}" if isinstance(error, float) else "")
    if kv := result["kv"]:
        ratio = f", {kv['cr_reads']:.2f}x fewer" if kv["cr_reads"] else ""
        peak = f"peak tokens {kv['peak_tokens']:.1f}, {kv['cr_peak']:.2f}x fewer"
        yield f"KV reads {kv['kv_reads']:.0f} a generation and KV head{ratio} than dense; {peak}"


@command(SAMPLE, "summarise")
def summarise(
    records: arg(list[Path], "directories (searched throughout) or JSONL files", "RECORDS..."),
    lengths: opt(list[int], "L, generated tokens", metavar="L..."),
    widths: opt(list[int], "W, voting chains", metavar="W..."),
    out: opt(Path, "the JSON file to write", metavar="FILE"),
    model: opt(str, "noted in the result, for comparisons with published tables") = None,
    task: opt(str, "noted in the result") = None,
):
    """curves.json of sampled chains: points, margins, paired differences"""
    from companion.experiments.summaries import summarise_files
    from companion.provenance import describe

    summary = summarise_files(records, lengths, widths) | {"model": model, "task": task, "environment": describe()}
    write_json(out, summary)
    return summary
