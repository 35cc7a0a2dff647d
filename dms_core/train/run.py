"""From a recipe to a family of checkpoints, in one process or under torchrun."""

import os
from pathlib import Path

import torch
from transformers import PreTrainedModel

from dms_core.checkpoint import fast_dtype, is_checkpoint, load_base, load_tokenizer
from dms_core.probe import has_states
from dms_core.storage import claim
from dms_core.train.data import PackedRows, prepare
from dms_core.train.recipe import Recipe
from dms_core.train.retrofit import CLAIM, retrofit
from dms_core.train.schedule import checkpoint_dir


def run_recipe(
    recipe: Recipe,
    out: Path | str,
    cpu=False,
    fsdp=False,
    report=None,
    load=None,
    make_data=None,
    bf16=True,
    until=None,
) -> dict:
    """Train as the recipe says; an interrupted run goes on.  Every process of torchrun calls this.

    out: directory for checkpoints and documents; it belongs to one recipe.  cpu: use no GPU, the default where there is
    none.  fsdp: shard model and teacher over the processes.  report: is given some lines about what is about to run, on
    the first process.  load: ``load(recipe)`` gives model and tokenizer, in place of ``load_model_and_tokenizer``;
    make_data: ``make_data(recipe, model, tokenizer, out)`` gives data set and facts, in place of ``make_packed_rows``.
    bf16: compute in bf16 on a GPU, by autocast; on a CPU in the weights' own precision unless the recipe
    has autocast and the CPU has instructions for bf16.
    until: stop after the checkpoint of this CR, where the next call goes on.

    Returns {"out", "steps", "checkpoints": {CR: directory}, "documents": facts}.  Raises ValueError where the batch
    does not divide over the processes, ``out`` holds another run, or model or data are out of reach.
    """
    out, settings = Path(out), recipe.retrofit
    processes, first = int(os.environ.get("WORLD_SIZE", 1)), int(os.environ.get("RANK", 0)) == 0
    settings.split(processes)  # before anything is loaded
    if first:
        claim(out, recipe.to_dict(), CLAIM)
    cpu = cpu or not torch.cuda.is_available()
    arguments = (
        {"use_cpu": True, "bf16": settings.autocast and fast_dtype("cpu") is torch.bfloat16} if cpu else {"bf16": bf16}
    )
    arguments |= {"ddp_backend": "gloo"} if cpu and processes > 1 else {}
    arguments |= {"fsdp": True} if fsdp else {}
    model, tokenizer = load(recipe) if load else load_model_and_tokenizer(recipe, cpu)
    data, facts = (make_data or make_packed_rows)(recipe, model, tokenizer, out)
    if first and report:
        report(summary_lines(recipe, processes, facts))
    arguments |= {"facts": recipe.own(), "train_sampling_strategy": "sequential"}
    retrofit(model, tokenizer, data, recipe.dms, settings, out, until=until, **arguments)
    saves = settings.schedule.saves().items()
    places = {f"{cr:g}": checkpoint_dir(out, cr) for step, cr in saves if step <= settings.steps}
    kept = {cr: str(place) for cr, place in places.items() if is_checkpoint(place)}  # with until not yet all
    return {"out": str(out), "steps": settings.steps, "checkpoints": kept, "documents": facts}


def load_model_and_tokenizer(recipe: Recipe, cpu: bool = False):
    """Model (fp32, or its fast dtype if its weights stay frozen) and tokenizer of a hub id or directory.

    cpu: it will train on a CPU, although there may be a GPU.
    """
    tokenizer = load_tokenizer(recipe.model)
    # frozen weights need no more precision; gates and low-rank factors are in fp32 by themselves
    device = "cuda" if torch.cuda.is_available() and not cpu else "cpu"
    dtype = torch.float32 if recipe.retrofit.train == "all" else fast_dtype(device)
    return load_base(recipe.model, dtype=dtype), tokenizer


def make_packed_rows(recipe: Recipe, model: PreTrainedModel, tokenizer, out: Path) -> tuple[PackedRows, dict]:
    """Packed rows for every step, and facts about the documents, which are kept in ``out``/documents.

    One document a row for a model that would carry a state from one into the next.
    """
    settings = recipe.retrofit
    size = settings.steps * settings.batch
    store = prepare(recipe.data, tokenizer, recipe.context, size * recipe.context, out / "documents", settings.seed)
    return PackedRows(store, recipe.context, size, settings.seed, has_states(model)), store.facts


def summary_lines(recipe: Recipe, processes: int, facts: dict) -> list[str]:
    """What is about to run, as text."""
    settings = recipe.retrofit
    at_once, times = settings.split(processes)
    lines = [
        f"{recipe.name}: {recipe.model}, gate {recipe.dms.gate}, window {recipe.dms.window}, CR {settings.final_cr:g}",
        f"{settings.steps} steps of {settings.batch} rows of {recipe.context} tokens: {processes} process(es), "
        f"{at_once} at once, {times} accumulated",
    ]
    if facts:
        lines.append(
            "{documents} documents of {tokens} tokens from {rows} rows; {cut} cut to the context ({tokens_cut} tokens "
            "lost), {dropped} without a token to predict dropped, {rejected_rows} rows without an accepted "
            "generation".format(**facts)
        )
    return lines
