"""The command line: help, lists of values, errors, start-up cost, and JSON against the types that document it."""

import json
import subprocess
import sys

import pytest
from typer.main import get_command

from companion.cli.app import app, spread
from companion.cli.main import main
from companion.cli.results import SHAPES
from companion.paths import REASONER, RESULTS

COMMANDS = get_command(app)
NAMES = sorted(COMMANDS.commands)
CHECKPOINT = str(REASONER / "dms-cr8")
SAMPLE = ["sample", "--model", CHECKPOINT, "--task", "traces", "--method", "dms", "--length", "8", "--out", "out"]
PLAN = ["plan", "--model", "qwen-r1-32b", "--batch", "64", "--context", "32768", "--cr", "8"]
HEAVY = {"torch", "transformers", "numpy", "pandas", "matplotlib", "datasets"}


KINDS = {"text": str, "true or false": bool}


def conforms(value, shape) -> bool:
    """Does a value have a shape of results.yaml?  A dictionary may have further keys; an empty interval is null."""
    if isinstance(shape, list):
        return isinstance(value, list) and all(conforms(item, *shape) for item in value)
    if isinstance(shape, dict):
        return isinstance(value, dict) and all(has(value, name, of) for name, of in shape.items() if name != "_")
    if shape in (None, "number"):
        return value is None or isinstance(value, int | float)
    return isinstance(value, KINDS.get(shape, object))


def has(value: dict, name: str, shape) -> bool:
    if name.startswith("<"):
        return all(conforms(item, shape) for item in value.values())
    key = name.removesuffix(" or null")
    return key in value and ((value[key] is None and key != name) or conforms(value[key], shape))


@pytest.mark.parametrize("arguments", [["--help"], PLAN])
def test_help_and_plan_import_no_heavy_package(arguments):
    code = (
        "import sys; from companion.cli.main import main; status = main(sys.argv[1:]); "
        f"print(sorted({HEAVY} & set(sys.modules)), file=sys.stderr); sys.exit(status)"
    )
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True)
    assert (done.returncode, done.stderr.strip()) == (0, "[]") and done.stdout


def test_help_names_every_command_in_a_group(capsys):
    assert main(["--help"]) == 0
    text = capsys.readouterr().out
    panels = [text.index(f"─ {panel} ─") for panel in ("Reproduce", "Retrofit", "Sample and grade", "Measure", "Batch")]
    assert panels == sorted(panels)
    assert all(f"│ {name} " in text for name in NAMES) and text.index("│ reproduce ") < text.index("│ ablate ")


@pytest.mark.parametrize("name", NAMES)
def test_help_of_a_command_shows_options_and_json(name, capsys):
    assert main([name, "--help"]) == 0
    text = capsys.readouterr().out
    assert "--json" in text and f" dms {name} " in text and "\\" not in text


@pytest.mark.parametrize(
    ("given", "parsed"),
    [
        ("curves --lengths 64 128 --json", "curves --lengths 64 --lengths 128 --json"),
        ("curves --lengths 64 --lengths 128", "curves --lengths 64 --lengths 128"),
        ("curves --lengths -1 2", "curves --lengths -1 --lengths 2"),
        ("retrofit --set a=1 b=2 --set c=3", "retrofit --set a=1 --set b=2 --set c=3"),
        ("fidelity --gates a b --data c", "fidelity --gates a --gates b --data c"),
        ("tokens --gates a --save --data c", "tokens --gates a --save  --data c"),
        ("bench train --save out.json", "bench train --save out.json"),
        ("grade --option a=1 one.jsonl two.jsonl", "grade --option a=1 one.jsonl two.jsonl"),
        ("notebook a.ipynb b.ipynb -p n -3 -p k [1]", "notebook a.ipynb b.ipynb -p n=-3 -p k=[1]"),
        ("frob --lengths 1 2", "frob --lengths 1 2"),
    ],
)
def test_options_of_several_values_are_spread(given, parsed):
    assert spread(COMMANDS, given.split()) == parsed.split(" ")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "Missing command"),
        (["frob"], "No such command 'frob'"),
        (["bench"], "Missing argument 'KIND'"),
        (["plan"], "Missing option '--model'"),
        (["plan", "--model"], "Option '--model' requires an argument"),
        (["plan", "--model", "x", "--frob"], "No such option: --frob"),
        (["curves", "--lengths", "x"], "Invalid value for '--lengths'"),
        (["stage", "--profile", "huge"], "profile 'huge': must be one of ['full', 'smoke', 'tiny']"),
        (
            [
                "sample",
                "--model",
                str(REASONER),
                "--task",
                "traces",
                "--limit",
                "1",
                "--method",
                "frob",
                "--length",
                "4",
                "--out",
                "unused",
            ],
            "method 'frob': must be one of vanilla, dms, h2o",
        ),
        (
            f"sample --model {REASONER} --gates x --task traces --method tova --cr 4 --length 4 --out unused".split(),
            "gates x with method 'tova': must be with dms or vanilla",
        ),
        (["reproduce", "--base", "x"], "--base x: must be with --no-book, the chapters are of reasoner"),
        (["reproduce", "--base", "x", "--no-book"], "base x: must be the directory of a model"),
        (["grade", "x.jsonl", "--task", "traces", "--option", "seed"], "--option seed: must be NAME=VALUE"),
        (["converse", "--model", "x", "--out", "y", "--turns", "0"], "--turns 0: must be >= 1"),
        (["ablate", "delay", "--finished"], "--finished with delay: must be an ablation by short retrofits"),
    ],
)
def test_bad_input_exits_with_2_and_one_line(arguments, message, capsys):
    assert main(arguments) == 2
    printed = capsys.readouterr()
    assert not printed.out and printed.err.startswith(f"dms: {message}") and printed.err.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "kind"),
    [
        (PLAN, "plan"),
        (["curves", "--results", str(RESULTS / "tiny")], "curves"),
        (["published", "--results", str(RESULTS / "tiny")], "published"),
        (["kernels"], "kernels"),
        (["retrofit", "--list"], "retrofit --list"),
        (["cache-report", "--checkpoint", str(REASONER / "dms-cr8")], "cache-report"),
        (["stage"], "stage"),
    ],
)
def test_json_has_the_documented_type(arguments, kind, capsys):
    assert main([*arguments, "--json"]) == 0
    assert conforms(json.loads(capsys.readouterr().out.splitlines()[-1]), SHAPES[kind])


@pytest.mark.parametrize(
    ("file", "kind"),
    [
        ("tiny/curves.json", "curves"),
        ("full/curves.json", "curves"),
        ("full/runtime.json", "runtime"),
        ("delay.json", "ablate delay"),
        ("smollm2.json", "fidelity"),
        ("smollm2-tokens.json", "tokens"),
        ("kernels-cpu.json", "bench"),
    ],
)
def test_stored_results_have_the_documented_type(file, kind):
    assert conforms(json.loads((RESULTS / file).read_text()), SHAPES[kind])
    assert all(
        conforms(v, SHAPES["ablate NAME"]) for v in json.loads((RESULTS / "ablations.json").read_text()).values()
    )


def test_every_command_documents_its_json():
    assert {key.split()[0] for key in SHAPES} == set(NAMES)


def test_missing_package_ends_in_one_line_that_names_its_group(monkeypatch, tmp_path, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", None)
    for name in ("companion.figures.curves", "companion.figures.style"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    assert main(["curves", "--results", str(RESULTS / "tiny"), "--figure", str(tmp_path / "curves.png")]) == 2
    message = "dms: matplotlib is not installed: pip install 'dms-companion[book]'\n"
    assert capsys.readouterr().err == message


def test_only_the_first_process_of_torchrun_prints_json(monkeypatch, capsys):
    monkeypatch.setenv("RANK", "1")
    assert main([*PLAN, "--json"]) == 0 and not capsys.readouterr().out
    monkeypatch.setenv("RANK", "0")
    assert main([*PLAN, "--json"]) == 0
    (line,) = capsys.readouterr().out.splitlines()
    assert json.loads(line)["largest_batch"] > 0


@pytest.mark.slow
def test_hub_id_out_of_reach_ends_a_command_at_once_in_one_line(tmp_path):
    """With no network: the hub's address refuses connections."""
    task = ["--task", "traces", "--limit", "1", "--method", "vanilla", "--length", "4", "--out", "unused"]
    (tmp_path / "data.jsonl").write_text('{"messages": []}\n')
    commands = [
        ["plan", "--model", "no/such"],
        ["sample", "--model", "no/such", *task],
        ["retrofit", "--recipe", "qwen-r1-1.5b", "--model", "no/such", "--out", "run"],
        ["converse", "--model", "no/such", "--out", "unused.jsonl"],
        ["fidelity", "--model", "no/such", "--gates", "x", "--data", "data.jsonl"],
        ["tokens", "--model", "no/such", "--gates", "x", "--data", "data.jsonl"],
    ]
    code = (
        "import json, sys, time, torch, transformers\n"
        "import companion.experiments.embedded, companion.experiments.fidelity, companion.experiments.sample\n"
        "from companion.cli.main import main\n"
        "for command in json.loads(sys.argv[1]):\n"
        "    began = time.perf_counter()\n"
        "    print(main(command), time.perf_counter() - began, flush=True)\n"
    )
    environment = {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_HOME": str(tmp_path), "PATH": "", "HF_HUB_OFFLINE": "0"}
    done = subprocess.run(
        [sys.executable, "-c", code, json.dumps(commands)],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env=environment,
    )
    rows = [line.split() for line in done.stdout.splitlines()]
    assert [status for status, _ in rows] == ["2"] * len(commands), done.stderr
    assert max(float(seconds) for _, seconds in rows) < 15, rows  # tried again and again it would be 20 and more
    said = [line for line in done.stderr.splitlines() if line.startswith("dms: ")]
    assert len(said) == len(commands) and all("no/such" in line for line in said)


@pytest.mark.parametrize("profile", ["../victim", "", "/"])
def test_fresh_deletes_nothing_for_an_unknown_profile(profile, tmp_path, capsys):
    victim = tmp_path / "victim" / "kept.txt"
    victim.parent.mkdir()
    victim.write_text("kept")
    (tmp_path / "runs").mkdir()
    assert main(["reproduce", "--profile", profile, "--runs", str(tmp_path / "runs"), "--fresh"]) == 2
    assert "must be one of ['full', 'smoke', 'tiny']" in capsys.readouterr().err and victim.read_text() == "kept"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["plan", "--model", "llama-3.1-8b", "--cr", "inf"], "cr inf: must be >= 1 and finite"),
        (["curves", "--results", str(RESULTS / "tiny"), "--figure", "nowhere/x.png"], "nowhere/x.png: No such file"),
        (["published", "--markdown", "nowhere/x.md"], "nowhere/x.md: No such file"),
        (["cache-report", "--cr", "7"], "--cr must be one of 4, 8"),
        ([*SAMPLE, "--cr", "-5"], "cr -5.0: must be a finite number >= 1"),
        ([*SAMPLE, "--cr", "nan"], "cr nan: must be a finite number >= 1"),
        ([*SAMPLE, "--lengths", "0", "-4"], "lengths 0, -4: must be >= 1"),
        ([*SAMPLE, "--length", "64", "--lengths", "32", "128"], "lengths 128: must be <= 64, up to which"),
        ([*SAMPLE, "--cr", "4"], "was trained to 8; leave --cr out"),
        (["vanilla" if word == "dms" else word for word in [*SAMPLE, "--cr", "8"]], "method vanilla: must be left out"),
        (["cache-report", "--checkpoint", str(REASONER / "dms-cr4"), "--cr", "8"], "was trained to 4; leave --cr out"),
        (["ablate", "loss", "--documents", "9"], "--documents, --delayed or --immediate with loss: must be with delay"),
        (["kernels", "--target", "90"], "--target 90: must be with --aot"),
        ([*SAMPLE, "--workers", "0"], "workers 0: must be >= 1"),
        ([*SAMPLE, "--device", "tpu"], "device 'tpu': must be one of cpu"),
        ([*SAMPLE, "--dtype", "float99"], "dtype 'float99': must be auto"),
    ],
)
def test_bad_value_ends_in_one_line_before_anything_is_written(arguments, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("companion.cli.reproduce.RUNS", tmp_path)  # whatever lies in the checkout's
    assert main(arguments) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("dms: ") and message in error and not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("records/dms-cr8-x.jsonl", '{"a": 1}\n', "no chain record; each must have method, cr"),
        ("curves.json", "{}", "must hold points, margins and paired"),
        ("run.json", "{}", "must hold task, lengths, widths and records"),
    ],
)
def test_curves_of_damaged_files_name_the_file(file, content, message, tmp_path, capsys):
    (tmp_path / file).parent.mkdir(exist_ok=True)
    (tmp_path / file).write_text(content)
    assert main(["curves", "--results", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert file in error and message in error


def test_ledger_without_a_run_of_ones_own_is_that_of_the_stored_results(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("companion.cli.reproduce.RUNS", tmp_path)
    assert main(["ledger", "--json", "--runs", str(tmp_path)]) == 0
    said = capsys.readouterr()
    claims = json.loads(said.out.splitlines()[-1])["claims"]
    assert "by the stored results" in said.err
    assert "stored, mean of three retrofits" in claims[0]["measured"] and claims[0]["verdict"] == "agrees"
    assert main(["ledger", "--profile", "smoke", "--runs", str(tmp_path)]) == 2
    assert "holds no finished run" in capsys.readouterr().err
