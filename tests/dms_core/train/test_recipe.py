import csv
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest
import yaml

from dms_core.config import DMSConfig
from dms_core.train.recipe import LATER, RetrofitConfig, load_recipe, parse_changes, recipe_names

ROOT = Path(__file__).parents[3]
TABLE3 = ROOT / "data" / "published" / "table3.csv"
ROWS = {
    ("Llama 3.2 Instruct", "1B"): "llama-3.2-1b",
    ("Llama 3.1", "8B"): "llama-3.1-8b",
    ("Qwen-R1", "1.5B"): "qwen-r1-1.5b",
    ("Qwen-R1", "7B"): "qwen-r1-7b",
    ("Qwen-R1", "32B"): "qwen-r1-32b",
    ("Qwen3", "8B"): "qwen3-8b",
}


def test_paper_recipes_are_the_rows_of_table_3():
    with TABLE3.open() as file:
        table = list(csv.DictReader(file))
    assert len(table) == 6
    for row in table:
        recipe = load_recipe(ROWS[row["family"], row["params"]])
        given = (recipe.retrofit.batch, recipe.context, recipe.dms.window, recipe.retrofit.lr)
        assert given == (int(row["batch"]), int(row["context"]), int(row["window"]), float(row["learning_rate"]))
        assert (recipe.retrofit.train, recipe.dms.gate, recipe.retrofit.neuron_warmup) == ("all", "neuron", 2000)
        assert recipe.retrofit.schedule.saves()[2700] == 8.0 and recipe.retrofit.steps == 2700  # 2000 of them warm-up


def test_released_adapter_recipe_reaches_cr_8_at_step_238_and_16_at_510():
    recipe = load_recipe("qwen3-8b-adapter").retrofit
    saves = {cr: step for step, cr in recipe.schedule.saves().items()}
    assert (saves[8.0], saves[16.0], recipe.train, recipe.direction) == (238, 510, "gates", "reverse")


@pytest.mark.parametrize("name", recipe_names())
def test_recipe_yaml_round_trip_is_identical(name, tmp_path):
    recipe = load_recipe(name)
    file = tmp_path / "recipe.yaml"
    file.write_text(recipe.to_yaml())
    assert load_recipe(str(file)) == recipe
    expected = {f.name for part in (DMSConfig, RetrofitConfig) for f in fields(part)} | {
        "name",
        "model",
        "data",
        "context",
    }
    unsaid = {name for name, value in LATER.items() if getattr(recipe.retrofit, name) == value}
    assert set(yaml.safe_load(recipe.to_yaml())) == expected - unsaid


def test_later_fields_are_written_where_they_say_something():
    recipe = load_recipe("reasoner")
    assert not set(LATER) & set(recipe.to_dict())  # names and claims of runs before them hash these settings
    other = recipe.changed(retrofit={"decay": 0, "neuron_zero": True})
    assert other.to_dict() == {**recipe.to_dict(), "decay": 0, "neuron_zero": True}
    assert load_recipe("reasoner", {"decay": 0, "neuron_zero": True}) == other
    assert {name: getattr(RetrofitConfig(), name) for name in LATER} == LATER


def test_changes_override_fields_of_a_recipe():
    changes = parse_changes(
        ["lr=1e-4", "window=7", "rests=[[2, 5]]", "gate_lr=null", "data=mine.jsonl", "betas=[0.8,0.9]"]
    )
    recipe = load_recipe("smollm2-135m", changes)
    assert (recipe.retrofit.lr, recipe.dms.window, recipe.retrofit.rests) == (1e-4, 7, ((2.0, 5),))
    assert (recipe.data, recipe.retrofit.betas, recipe.retrofit.gate_lr) == ("mine.jsonl", (0.8, 0.9), None)


@pytest.mark.parametrize(
    "change, message",
    [
        ("widow=3", r"unknown field 'widow' \(did you mean window\?\): must be one of"),
        ("lr=fast", "lr 'fast': must be a number"),
        ("lr=true", "lr True: must be a number"),
        ("gate_lr=-1", "gate_lr -1.0: must be >= 0"),
        ("device_batch=true", "device_batch True: must be an integer or null"),
        ("batch=.inf", "batch inf: must be an integer"),
        ("rests={a: 1}", "rests {'a': 1}: must be a list, each item"),
        ("batch=2.5", "batch 2.5: must be an integer"),
        ("rests=[[4]]", r"rests \[\[4\]\]: must be a list, each item \[a number, an integer\]"),
        ("checkpointing=1", "checkpointing 1: must be true or false"),
        ("train=bias", "train 'bias': must be one of"),
        ("window=-1", "window -1: must be >= 0"),
        ("context=1", "context 1: must be >= 2"),
        ("betas=[0.9,1.5]", r"betas \[0.9, 1.5\]: must be"),
        ("final_cr", "--set final_cr: must be field=value"),
    ],
)
def test_bad_field_or_value_is_named(change, message):
    with pytest.raises(ValueError, match=message):
        load_recipe("smollm2-135m", parse_changes([change]))


def test_changed_recipe_differs_in_the_given_fields_only():
    recipe = load_recipe("reasoner")
    assert recipe.changed() == recipe
    other = recipe.changed("immediate", dms={"eviction": "immediate"}, retrofit={"direction": "lm"})
    changes = {"name": "immediate", "eviction": "immediate", "direction": "lm"}
    assert other.to_dict() == {**recipe.to_dict(), **changes}
    with pytest.raises(ValueError, match="batch 0: must be >= 1"):
        recipe.changed(retrofit={"batch": 0})


def test_reading_recipes_does_not_import_torch():
    code = "import sys, dms_core.train.recipe as r; r.load_recipe('reasoner'); print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"


def test_bad_recipe_file_is_named(tmp_path):
    file = tmp_path / "mine.yaml"
    for text, message in (("a: [", "not valid YAML"), ("- 1", "must be a mapping"), ("lr: 1", "'model'.* missing")):
        file.write_text(text)
        with pytest.raises(ValueError, match=f"mine.yaml: .*{message}"):
            load_recipe(str(file))
    with pytest.raises(ValueError, match=r"recipe 'llama': must be a YAML file or one of .*qwen3-8b"):
        load_recipe("llama")


@pytest.mark.parametrize(
    "batch, device_batch, processes, split",
    [
        (1024, 1, 8, (1, 128)),
        (1024, 4, 32, (4, 8)),
        (12, None, 1, (12, 1)),
        (12, None, 4, (3, 1)),
        (8, 2, 1, (2, 4)),
    ],
)
def test_split_gives_device_batch_and_accumulation_steps(batch, device_batch, processes, split):
    assert RetrofitConfig(batch=batch, device_batch=device_batch).split(processes) == split


@pytest.mark.parametrize("batch, device_batch, processes", [(12, None, 5), (2, None, 4), (12, 5, 1), (12, 4, 2)])
def test_indivisible_batch_is_refused(batch, device_batch, processes):
    with pytest.raises(ValueError, match=f"batch {batch} over {processes} process"):
        RetrofitConfig(batch=batch, device_batch=device_batch).split(processes)
