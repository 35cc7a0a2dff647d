"""Recipes that name the embedded model (``reasoner``) or its data (program ``traces``)."""

from collections.abc import Callable
from pathlib import Path

from companion.paths import REASONER
from companion.tasks.mixture import TraceDataset
from companion.tasks.reasoner import load_tokenizer
from dms_core.checkpoint import load_base
from dms_core.train.recipe import Recipe
from dms_core.train.run import load_model_and_tokenizer, make_packed_rows, run_recipe


def train_recipe(
    recipe: Recipe,
    out: Path,
    cpu: bool = False,
    fsdp: bool = False,
    report: Callable | None = None,
    base: Path = REASONER,
    until: float | None = None,
) -> dict:
    """``run_recipe`` that knows these two names; base: the directory of the model ``reasoner``."""

    def load(recipe: Recipe):
        if recipe.model == "reasoner" and not Path(recipe.model).exists():
            return load_base(base), load_tokenizer(base)
        return load_model_and_tokenizer(recipe, cpu)

    def make_data(recipe: Recipe, model, tokenizer, out: Path):
        if recipe.data == "traces" and not Path(recipe.data).exists():
            size, batch = recipe.retrofit.steps * recipe.retrofit.batch, recipe.retrofit.batch
            return TraceDataset(tokenizer, size, batch, seed=recipe.retrofit.seed), {}
        return make_packed_rows(recipe, model, tokenizer, out)

    precise = recipe.model == "reasoner"  # so small that a GPU gains nothing from bf16
    return run_recipe(recipe, out, cpu, fsdp, report, load, make_data, bf16=not precise, until=until)
