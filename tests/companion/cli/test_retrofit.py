"""``dms retrofit``: listing, showing and running recipes."""

import json

import yaml

from companion.cli.main import main
from companion.paths import REASONER
from companion.tasks.programs import make_problem
from dms_core.checkpoint import load_base
from dms_core.train.recipe import RECIPES


def test_command_lists_and_shows_recipes(capsys):
    assert main(["retrofit", "--list", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["recipes"] == sorted(file.stem for file in RECIPES.glob("*.yaml"))
    assert main(["retrofit", "--recipe", "qwen-r1-7b", "--show", "--set", "lr=1e-6", "final_cr=4"]) == 0
    shown = yaml.safe_load(capsys.readouterr().out)
    assert (shown["lr"], shown["final_cr"], shown["context"]) == (1e-6, 4.0, 8192)


def test_command_refuses_in_one_line(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "3")
    assert main(["retrofit", "--recipe", "qwen-r1-7b", "--out", str(tmp_path)]) == 2
    said = capsys.readouterr().err
    assert said == "dms: batch 1024 over 3 process(es) with device_batch 1: batch must be a multiple of 3\n"
    assert main(["retrofit", "--recipe", "qwen-r1-7b"]) == 2 and "--out missing" in capsys.readouterr().err
    assert main(["retrofit"]) == 2 and "--recipe missing" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_command_retrofits_from_a_jsonl_file(tmp_path, capsys):
    """The embedded model from a directory, its packed traces from a file, two steps."""
    problems = [make_problem("retrofit", 0, i) for i in range(12)]
    rows = [
        {
            "messages": [
                {"role": "user", "content": p.prompt.removesuffix(">")},
                {"role": "assistant", "content": p.trace},
            ]
        }
        for p in problems
    ]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = str(tmp_path / "rows.jsonl")
    command = [
        "retrofit",
        "--recipe",
        "reasoner",
        "--model",
        str(REASONER),
        "--data",
        data,
        "--json",
        "--device",
        "cpu",
        "--out",
        str(tmp_path / "run"),
        "--set",
        "context=400",
        "final_cr=2",
        "rests=[]",
        "steps_per_unit=2",
        "batch=2",
        "warmup=0",
    ]
    assert main(command) == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert result["steps"] == 2 and result["documents"]["documents"] >= 2
    assert load_base(result["checkpoints"]["2"]) is not None
    assert main([*command[:-1], "warmup=1"]) == 2
    assert "holds a run with other warmup" in capsys.readouterr().err
