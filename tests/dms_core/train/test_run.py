"""From a recipe to checkpoints: the embedded model on a file, and tiny models handed in."""

import json
from dataclasses import replace

import pytest
import torch

from companion import families
from companion.experiments.embedded import train_recipe
from companion.paths import REASONER
from companion.tasks.programs import make_problem
from companion.tasks.reasoner import make_tokenizer
from dms_core.checkpoint import load_base, read_settings
from dms_core.train import losses
from dms_core.train.recipe import load_recipe
from dms_core.train.run import run_recipe

SHORT = {"final_cr": 2.0, "steps_per_unit": 2, "rests": (), "batch": 2, "warmup": 0, "save_steps": 1}


@pytest.fixture
def recipe(tmp_path):
    """Two steps of the embedded model on packed traces in a file."""
    problems = [make_problem("retrofit", 0, i) for i in range(12)]
    rows = [{"problem": p.prompt, "generations": [p.trace], "correctness_math_verify": [True]} for p in problems]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    recipe = load_recipe("reasoner", {"model": str(REASONER), "data": str(tmp_path / "rows.jsonl"), "context": 400})
    return recipe.changed(retrofit=SHORT)


def test_recipe_becomes_checkpoints_and_goes_on_with_the_same_settings_only(recipe, tmp_path):
    lines, out = [], tmp_path / "run"
    result = run_recipe(recipe, out, cpu=True, report=lines.extend)
    assert (result["out"], result["steps"], list(result["checkpoints"])) == (str(out), 2, ["2"])
    assert read_settings(result["checkpoints"]["2"])["step"] == 2
    assert load_base(result["checkpoints"]["2"]) is not None
    rows = result["documents"]["rows"]
    assert 2 <= rows <= 12 and lines[0].startswith("reasoner: ") and f"{rows} rows" in lines[-1]
    assert json.loads((out / "recipe.json").read_text()) == recipe.to_dict()
    stamp = (out / "documents" / "tokens.bin").stat().st_mtime_ns
    assert run_recipe(recipe, out, cpu=True) == result
    assert (out / "documents" / "tokens.bin").stat().st_mtime_ns == stamp
    for other, field in ((recipe.changed(dms={"window": 3}), "window"), (replace(recipe, context=300), "context")):
        with pytest.raises(ValueError, match=f"{out} holds a run with other {field}: give"):
            run_recipe(other, out, cpu=True)
    assert json.loads((out / "recipe.json").read_text()) == recipe.to_dict()


@pytest.mark.parametrize("autocast, able", [(False, True), (True, True), (True, False)])
def test_autocast_is_what_recipe_and_cpu_say_and_weights_stay_in_fp32(recipe, tmp_path, monkeypatch, autocast, able):
    seen, plain = set(), losses.chunked_loss
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: able)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)

    def watched(*given):
        seen.add(torch.is_autocast_enabled("cpu"))
        return plain(*given)

    monkeypatch.setattr(losses, "chunked_loss", watched)
    result = run_recipe(recipe.changed(retrofit={"autocast": autocast}), tmp_path / "run", cpu=True)
    weights = load_base(result["checkpoints"]["2"], dtype="auto").parameters()
    assert seen == {autocast and able} and {p.dtype for p in weights} == {torch.float32}


def test_model_and_data_can_be_handed_in(recipe, tmp_path, tiny_model):
    asked = []
    rows = [{"input_ids": list(range(1, 20)), "labels": list(range(1, 20))}] * 4

    def load(recipe):
        asked.append(recipe)
        return tiny_model(gates=False), make_tokenizer()

    def make_data(recipe, model, tokenizer, out):
        asked.append((recipe, out))
        return rows, {}

    result = run_recipe(recipe, tmp_path / "run", cpu=True, load=load, make_data=make_data)
    assert asked == [recipe, (recipe, tmp_path / "run")] and result["documents"] == {}
    assert torch.isfinite(next(load_base(result["checkpoints"]["2"]).parameters())).all()


def test_model_with_states_trains_on_one_document_a_row(recipe, tmp_path):
    """Through the door of ``dms retrofit``; packed documents would be refused."""
    tokenizer, place = make_tokenizer(), tmp_path / "hybrid"
    families.tiny_model("qwen3_next", vocab_size=len(tokenizer)).save_pretrained(place)
    tokenizer.save_pretrained(place)
    result = train_recipe(replace(recipe, model=str(place)), tmp_path / "run", cpu=True)
    assert result["steps"] == 2 and (tmp_path / "run" / "cr2" / "model.safetensors").exists()


def test_model_out_of_reach_is_named_in_one_line(recipe, tmp_path):
    with pytest.raises(ValueError, match=r"^model 'no/such': neither a directory nor a hub id in reach") as error:
        run_recipe(replace(recipe, model="no/such"), tmp_path / "run", cpu=True)
    assert "\n" not in str(error.value)


def test_batch_that_does_not_divide_is_refused_before_anything_is_written(recipe, tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "3")
    with pytest.raises(ValueError, match=r"batch 2 over 3 process\(es\)"):
        run_recipe(recipe, tmp_path / "run", cpu=True)
    assert not (tmp_path / "run").exists()
