"""Reads a workflow configuration: fills in defaults and refuses what it does not know."""

import hashlib
import json

COMMON = {  # key: default
    "runs": "runs",  # directory that holds one directory a configuration
    "notebooks": None,  # {name: {parameter: value}}
    "resources": {},  # {rule: {gpus, mem, runtime, partition, account, threads}}; "default" is for all rules
    "dms": None,  # the command; by default that of the Python that runs Snakemake
}
EMBEDDED = {**COMMON, "profile": None, "seed": 0}
MODEL = {
    **COMMON,
    "name": None,  # directory under `runs`
    "model": None,  # hub id or directory
    "recipe": None,  # of `dms retrofit`
    "data": None,  # what `dms retrofit` trains on; None: what the recipe says
    "launch": None,  # starts `dms retrofit` on many GPUs, in place of `dms`
    "launch_sample": None,  # starts `dms sample` on GPUs that split the model, in place of `dms`
    "shards": 1,  # jobs that share the chains of one (task, method, CR), each with the resources of `sample`
    "architecture": None,  # for estimates: a name that `dms plan` knows, or sizes; None: the model's config.json
    "published_as": None,  # the model's name in data/published, None if it is not there
    "methods": None,  # {name: [compression ratios]}
    "tasks": None,  # {name: TASK}
}
TASK = {
    "published_as": None,  # the benchmark's name in data/published
    "problems": None,  # how many there are, for estimates
    "chains": None,  # sampled a problem
    "lengths": None,  # L; chains are sampled at the largest
    "widths": None,  # W
    "options": "",  # further arguments of `dms sample`
}
RESOURCES = {"gpus": "gpu", "mem": "mem", "runtime": "runtime", "partition": "slurm_partition",
             "account": "slurm_account", "threads": "_cores"}  # fmt: skip


def settings(config: dict) -> dict:
    """The configuration with defaults.  Raises ValueError that names an unknown or missing key and what is allowed."""
    if not config:
        raise ValueError("no configuration: give --configfile workflow/config/NAME.yaml")
    if ("profile" in config) == ("model" in config):
        raise ValueError("a configuration has either `profile` (embedded model) or `model` (any other)")
    filled = _filled("configuration", config, EMBEDDED if "profile" in config else MODEL)
    if "model" in config:
        needed = [key for key in ("name", "recipe", "methods", "tasks") if not filled[key]]
        if needed:
            raise ValueError(f"a configuration with `model` also needs {', '.join(needed)}")
        if not isinstance(filled["shards"], int) or filled["shards"] < 1:
            raise ValueError(f"shards {filled['shards']}: must be a whole number >= 1")
        filled["tasks"] = {name: _filled(f"task {name}", task, TASK) for name, task in filled["tasks"].items()}
    for rule, values in filled["resources"].items():
        _filled(f"resources of {rule}", values, dict.fromkeys(RESOURCES))
    return filled


def resources(filled: dict, rule: str) -> dict:
    """A rule's resources under Snakemake's names; 0 GPUs and empty names are left out, as Slurm wants it."""
    values = {**filled["resources"].get("default", {}), **filled["resources"].get(rule, {})}
    return {RESOURCES[key]: value for key, value in values.items() if value and key != "threads"}


def threads(filled: dict, rule: str) -> int:
    values = {**filled["resources"].get("default", {}), **filled["resources"].get(rule, {})}
    return int(values.get("threads", 1))


def key(*facts) -> str:
    """A short hash: results of other settings lie beside these, and an interrupted run finds its own again."""
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:8]


def _filled(what: str, values: dict, defaults: dict) -> dict:
    if unknown := set(values) - set(defaults):
        raise ValueError(f"{what}: unknown {', '.join(sorted(unknown))}; allowed: {', '.join(sorted(defaults))}")
    return {**defaults, **values}
