"""Reads a workflow configuration: fills in defaults, and refuses what it does not know before any job is scheduled.

Every field has one entry below: its default and how its value is read.  YAML 1.1 reads 8e3 as text; where a number is
wanted it counts as one.
"""

import hashlib
import json
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path

BASELINES = ("h2o", "quest", "random", "rkv", "streaming-llm", "tova")
METHODS = ("dms", "vanilla", "snapkv", *BASELINES, *(f"{name}-protected" for name in BASELINES))  # of `dms sample`
MEMORY = re.compile(r"[0-9.]+ ?[kKMGTP]?i?B")
EXPONENT = re.compile(r"[-+]?[0-9.]+[eE][-+]?[0-9]+")
TIME = re.compile(r"([0-9.]+ ?[smhdw] ?)+")


def number(value, least: float = 1) -> float:
    """Raises ValueError that says what is allowed, as all of these readers."""
    try:
        read = float("nan" if isinstance(value, bool) else value)
    except (TypeError, ValueError):
        read = float("nan")
    if not least <= read < float("inf"):
        raise ValueError(f"must be a number >= {least}")
    return read


def whole(value, least: int = 1) -> int:
    try:
        read = number(value, least)
    except ValueError:
        read = 0.5
    if not read.is_integer():
        raise ValueError(f"must be a whole number >= {least}")
    return int(read)


def text(value) -> str:
    if not isinstance(value, str) or not value:
        raise ValueError("must be text")
    return value


def optional(read: Callable, value):
    """None and "" stand for what is not given."""
    return value if value is None or value == "" else read(value)


def several(read: Callable, value) -> list:
    if not isinstance(value, list) or not value:
        raise ValueError("must be a list of one or more")
    return [_read(f"item {place}", read, item) for place, item in enumerate(value, 1)]


def matching(pattern: re.Pattern, example: str, value) -> str:
    if not isinstance(value, str) or not pattern.fullmatch(value):
        raise ValueError(f"must be text such as {example}")
    return value


def runtime(value) -> str | int:
    """Minutes, or text with a unit."""
    if isinstance(value, str) and TIME.fullmatch(value):
        return value
    try:
        return whole(value)
    except ValueError as error:
        raise ValueError("must be minutes, or text such as 30m or 2d") from error


def named(names: re.Pattern, read: Callable, value) -> dict:
    """A mapping whose keys match."""
    if not isinstance(value, dict) or not value:
        raise ValueError("must be a mapping of one or more")
    if wrong := [key for key in value if not names.fullmatch(str(key))]:
        raise ValueError(f"{wrong[0]!r}: must match {names.pattern}")
    return {str(key): _read(str(key), read, item) for key, item in value.items()}


def fields(table: dict, value) -> dict:
    """A mapping with the fields of ``table``, defaults filled in."""
    if not isinstance(value, dict):
        raise ValueError("must be a mapping")
    if unknown := sorted(map(str, set(value) - set(table))):
        raise ValueError(f"unknown {', '.join(unknown)}; allowed: {', '.join(sorted(table))}")
    read = {key: _read(key, reader, value[key]) for key, (_, reader) in table.items() if key in value}
    return {**{key: default for key, (default, _) in table.items()}, **read}


def parameters(value) -> dict:
    """Of a notebook: numbers that YAML 1.1 took for text become numbers."""
    if not isinstance(value, dict | None):
        raise ValueError("must be a mapping of parameters")
    return {key: _exponent(item) for key, item in (value or {}).items()}


def _exponent(value):
    if isinstance(value, list):
        return [_exponent(item) for item in value]
    if not isinstance(value, str) or not EXPONENT.fullmatch(value):
        return value
    return int(float(value)) if float(value).is_integer() else float(value)


def architecture(value) -> str | dict:
    """A name, or sizes."""
    sizes = ("layers", "hidden", "mlp", "kv_width", "vocabulary")
    if not isinstance(value, dict):
        return text(value)
    read = fields(dict.fromkeys(sizes, (None, whole)), value)
    if missing := [size for size in sizes if read[size] is None]:
        raise ValueError(f"{', '.join(missing)} missing; must have {', '.join(sizes)}")
    return read


NAME = re.compile("[a-z][a-z0-9-]*")
RULES = re.compile("default|retrofit|held_out|records|summary|sample|curves|notebook|book")
NUMBERS = partial(several, whole)
RESOURCE = {  # field: (default, how it is read)
    "gpus": (None, partial(whole, least=0)),
    "mem": (None, partial(optional, partial(matching, MEMORY, "16GB"))),
    "runtime": (None, partial(optional, runtime)),
    "partition": (None, partial(optional, text)),
    "account": (None, partial(optional, text)),
    "threads": (None, whole),
}
SNAKEMAKE = {
    "gpus": "gpu",
    "mem": "mem",
    "runtime": "runtime",
    "partition": "slurm_partition",
    "account": "slurm_account",
}
TASK = {
    "published_as": (None, partial(optional, text)),  # the benchmark's name in data/published
    "problems": (None, partial(optional, whole)),  # how many there are, for estimates
    "chains": (None, whole),  # sampled a problem
    "lengths": (None, NUMBERS),  # L; chains are sampled at the largest
    "widths": (None, NUMBERS),  # W
    "options": ("", partial(optional, text)),  # further arguments of `dms sample`
}
COMMON = {
    "runs": ("runs", text),  # directory that holds one directory a configuration
    "notebooks": (None, partial(optional, partial(named, re.compile(".+"), parameters))),  # {name: {parameter: value}}
    # {rule: {gpus, mem, runtime, partition, account, threads}}; "default" is for all rules
    "resources": (None, partial(optional, partial(named, RULES, partial(fields, RESOURCE)))),
    "dms": (None, partial(optional, text)),  # the command; by default that of the Python that runs Snakemake
}
EMBEDDED = {**COMMON, "profile": (None, text), "seed": (0, partial(whole, least=0))}
MODEL = {
    **COMMON,
    "name": (None, text),  # directory under `runs`
    "model": (None, text),  # hub id or directory
    "recipe": (None, text),  # of `dms retrofit`
    "data": (None, partial(optional, text)),  # what `dms retrofit` trains on; None: what the recipe says
    "launch": (None, partial(optional, text)),  # starts `dms retrofit` on many GPUs, in place of `dms`
    "launch_sample": (None, partial(optional, text)),  # starts `dms sample` on GPUs that split the model
    "shards": (1, whole),  # jobs that share the chains of one (task, method, CR), each with the resources of `sample`
    "architecture": (None, partial(optional, architecture)),  # for estimates: a name that `dms plan` knows, or sizes
    "published_as": (None, partial(optional, text)),  # the model's name in data/published, None if it is not there
    "methods": (None, partial(named, NAME, partial(several, number))),  # {name: [compression ratios]}
    "tasks": (None, partial(named, re.compile("[a-z0-9_:-]+"), partial(fields, TASK))),  # {name: TASK}
}


def settings(config: dict) -> dict:
    """The configuration with defaults.  Raises ValueError that names the field, its value and what is allowed."""
    if not config:
        raise ValueError("no configuration: give --configfile workflow/config/NAME.yaml")
    if ("profile" in config) == ("model" in config):
        raise ValueError("a configuration has either `profile` (embedded model) or `model` (any other)")
    filled = _read("configuration", partial(fields, EMBEDDED if "profile" in config else MODEL), config)
    if "model" in config:
        _check_model(filled)
    return filled


def _check_model(filled: dict) -> None:
    """What a retrofit would be paid for in vain."""
    if needed := [key for key in ("name", "recipe", "methods", "tasks") if not filled[key]]:
        raise ValueError(f"a configuration with `model` also needs {', '.join(needed)}")
    for name, task in filled["tasks"].items():
        if needed := [key for key in ("chains", "lengths", "widths") if task[key] is None]:
            raise ValueError(f"tasks: {name}: also needs {', '.join(needed)}")
        if max(task["widths"]) > task["chains"]:
            raise ValueError(f"tasks: {name}: widths {task['widths']}: must be <= chains, {task['chains']}")
    if unknown := [name for name in filled["methods"] if name not in METHODS]:
        raise ValueError(f"methods: {unknown[0]}: must be one of {', '.join(METHODS)}")
    if crs := filled["methods"].get("dms"):
        from dms_core.train.recipe import load_recipe

        made = sorted(load_recipe(filled["recipe"]).retrofit.schedule.saves().values())
        if lacking := [cr for cr in crs if cr not in made]:
            ratios = ", ".join(f"{cr:g}" for cr in made)
            raise ValueError(
                f"methods: dms: CR {lacking[0]:g}: recipe {filled['recipe']} makes checkpoints at {ratios}"
            )


def resources(filled: dict, rule: str) -> dict:
    """A rule's resources under Snakemake's names; 0 GPUs and empty names are left out, as Slurm wants it."""
    return {SNAKEMAKE[key]: value for key, value in _of_rule(filled, rule).items() if value and key != "threads"}


def threads(filled: dict, rule: str) -> int:
    return _of_rule(filled, rule).get("threads", 1)


def _of_rule(filled: dict, rule: str) -> dict:
    parts = ((filled["resources"] or {}).get(part, {}) for part in ("default", rule))
    return {key: value for part in parts for key, value in part.items() if value is not None}


def contents(name: str | None) -> str | None:
    """What a key says of a recipe or of data: a name, or of a file what is in it, so that an edited one is another."""
    file = Path(name or "")
    return hashlib.sha256(file.read_bytes()).hexdigest() if file.is_file() else name


def key(*facts) -> str:
    """A short hash: results of other settings lie beside these, and an interrupted run finds its own again."""
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:8]


def _read(name: str, read: Callable, value):
    """The value as ``read`` takes it; an error names the field, and the value where nothing inside it is to blame."""
    try:
        return read(value)
    except ValueError as error:
        shown = f" {value!r}" if str(error).startswith("must be") else ""
        raise ValueError(f"{name}{shown}: {error}") from error
