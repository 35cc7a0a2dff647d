"""``dms retrofit``: a recipe, a model and data to a family of checkpoints, on one process or under torchrun."""

import os
from pathlib import Path

from dms_core.train.recipe import Recipe, load_recipe, parse_changes, recipe_file, recipe_names

HELP = """\
  dms retrofit --json      {"out", "steps", "checkpoints": {CR: directory}, "documents": {"rows", "rejected_rows",
                           "documents", "cut", "tokens_cut", "dropped", "tokens", "labelled"}}; with --list
                           {"recipes"}, with --show the recipe's fields
"""


def add_commands(add) -> None:
    """``add(name, run, text)`` makes a command with --json."""
    command = add("retrofit", run_retrofit, "teach a model to evict, by a recipe; also under torchrun")
    command.add_argument("--recipe", help="a recipe of the library (see --list) or a YAML file")
    command.add_argument("--model", help="hub id or directory (default: the recipe's)")
    command.add_argument("--data", help="hub id or JSONL file (default: the recipe's)")
    command.add_argument("--out", type=Path, help="where checkpoints go; an interrupted run goes on from there")
    command.add_argument("--set", action="append", nargs="+", default=[], metavar="FIELD=VALUE",
                         help="change fields of the recipe; values are YAML, such as rests=[[4,200]]")  # fmt: skip
    command.add_argument("--list", action="store_true", help="print the library's recipes and exit")
    command.add_argument("--show", action="store_true", help="print the recipe, changes included, and exit")
    command.add_argument("--cpu", action="store_true", help="use no GPU (the default where there is none)")
    command.add_argument("--fsdp", action="store_true", help="shard weights over the processes (FSDP2)")


def run_retrofit(args) -> dict:
    if args.list:
        return list_recipes(args.json)
    if args.recipe is None:
        raise ValueError(f"--recipe missing: must be a YAML file or one of {', '.join(recipe_names())}")
    changes = parse_changes([pair for group in args.set for pair in group])
    changes |= {name: getattr(args, name) for name in ("model", "data") if getattr(args, name) is not None}
    recipe = load_recipe(args.recipe, changes)
    if args.show:
        if not args.json:
            print(recipe.to_yaml(), end="")
        return recipe.to_dict()
    if args.out is None:
        raise ValueError("--out missing: must be a directory for the checkpoints")
    return train(recipe, args.out, args.cpu, args.fsdp, quiet=args.json)


def list_recipes(quiet: bool) -> dict:
    names = recipe_names()
    for name in [] if quiet else names:
        print(f"{name:18}", recipe_file(name).read_text().splitlines()[0].removeprefix("# "))
    return {"recipes": names}


def train(recipe: Recipe, out: Path, cpu: bool = False, fsdp: bool = False, quiet: bool = True) -> dict:
    """Run the recipe; returns where the checkpoints are and what the data held."""
    import torch

    from dms_core.train.retrofit import checkpoint_dir, retrofit

    processes, settings = int(os.environ.get("WORLD_SIZE", 1)), recipe.retrofit
    settings.split(processes)  # before anything is loaded
    first = int(os.environ.get("RANK", 0)) == 0
    if first:
        claim(recipe, out)
    cpu = cpu or not torch.cuda.is_available()
    arguments = {"use_cpu": True} if cpu else {"bf16": True}
    arguments |= {"ddp_backend": "gloo"} if cpu and processes > 1 else {}
    arguments |= {"fsdp": True} if fsdp else {}
    model, tokenizer = load(recipe.model, settings.train == "gates")
    data, facts = make_data(recipe, tokenizer, out)
    if first and not quiet:
        print("\n".join(lines(recipe, processes, facts)), flush=True)
    retrofit(model, tokenizer, data, recipe.dms, settings, out, train_sampling_strategy="sequential", **arguments)
    saves = settings.schedule.saves().items()
    kept = {f"{cr:g}": str(checkpoint_dir(out, cr)) for step, cr in saves if step <= settings.steps}
    return {"out": str(out), "steps": settings.steps, "checkpoints": kept, "documents": facts}


def claim(recipe: Recipe, out: Path) -> None:
    """Put recipe.yaml there.  Raises ValueError if the directory holds a run of another recipe."""
    import yaml

    file = out / "recipe.yaml"
    if file.exists():
        before, now = yaml.safe_load(file.read_text()), recipe.to_dict()
        if changed := sorted(field for field in now if before.get(field) != now[field]):
            raise ValueError(f"{out} holds a run with other {', '.join(changed)}: give the new run another directory")
    out.mkdir(parents=True, exist_ok=True)
    file.write_text(recipe.to_yaml())


def load(name: str, frozen: bool = False):
    """Model (fp32, or bf16 if its weights stay frozen) and tokenizer of a hub id, a directory, or ``reasoner``."""
    import torch
    from transformers import AutoTokenizer

    from companion.paths import REASONER
    from companion.tasks.reasoner import load_tokenizer
    from dms_core.checkpoint import load_base

    if name == "reasoner" and not Path(name).exists():
        return load_base(REASONER), load_tokenizer()
    try:
        # frozen weights need no more precision; the gates are in fp32 by themselves
        dtype = torch.bfloat16 if frozen else torch.float32
        return load_base(name, dtype=dtype), AutoTokenizer.from_pretrained(name)
    except OSError as error:
        reason = str(error).strip().split("\n")[0]
        raise ValueError(f"model {name!r}: neither a directory nor a hub id in reach ({reason})") from error


def make_data(recipe: Recipe, tokenizer, out: Path):
    """Rows for every step of the recipe, and facts about the documents they are made of."""
    from companion.tasks.dataset import TraceDataset
    from dms_core.train.data import prepare
    from dms_core.train.packing import PackedRows

    settings = recipe.retrofit
    size = settings.steps * settings.batch
    if recipe.data == "traces" and not Path(recipe.data).exists():
        return TraceDataset(tokenizer, size, settings.batch, seed=settings.seed), {}
    store = prepare(recipe.data, tokenizer, recipe.context, size * recipe.context, out / "documents", settings.seed)
    facts = {name: value for name, value in store.facts.items() if name != "key"}
    return PackedRows(store, recipe.context, size, settings.seed), facts


def lines(recipe: Recipe, processes: int, facts: dict) -> list[str]:
    """What is about to run, as text."""
    settings = recipe.retrofit
    at_once, times = settings.split(processes)
    text = [
        f"{recipe.name}: {recipe.model}, gate {recipe.dms.gate}, window {recipe.dms.window}, CR {settings.final_cr:g}",
        f"{settings.steps} steps of {settings.batch} rows of {recipe.context} tokens: {processes} process(es), "
        f"{at_once} at once, {times} accumulated",
    ]
    if facts:
        text.append(
            "{documents} documents of {tokens} tokens from {rows} rows; {cut} cut to the context ({tokens_cut} tokens "
            "lost), {dropped} without a token to predict dropped, {rejected_rows} rows without an accepted "
            "generation".format(**facts)
        )
    return text
