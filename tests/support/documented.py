"""What documents show to type, and ways to try it: see tests/test_documented_commands.py."""

import argparse
import ast
import contextlib
import json
import os
import re
import runpy
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
WORDS = "dms|make|papermill|snakemake|torchrun|python|pip|apt-get|sbatch"
NAMES = {"pip install", "python -I -c"}  # of programs, not commands to type
BARE = re.compile("dms [a-z-]+")  # the name of a command in a sentence; it needs no entry
HEADERS = (".yaml", ".yml", ".smk", ".sbatch", ".sh")


def documents():
    """(name, text, whether lines that begin with a command count)."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    for name in filter(None, listed.stdout.split("\0")):
        file = ROOT / name
        if name == "LOG.md" or not file.is_file():  # a log tells what was typed then
            continue
        if file.suffix == ".md":
            yield name, file.read_text(), False
        elif file.suffix == ".ipynb":
            cells = json.loads(file.read_text())["cells"]
            yield name, "\n\n".join("".join(x["source"]) for x in cells if x["cell_type"] == "markdown"), False
        elif file.suffix == ".py" and file.name not in ("documented.py", "test_documented_commands.py"):
            yield name, ast.get_docstring(ast.parse(file.read_text())) or "", True
        elif file.suffix in HEADERS or file.name in ("Snakefile", "Makefile", "pyproject.toml"):
            comments = "\n".join(line[1:] for line in file.read_text().splitlines() if line.startswith("#"))
            yield name, comments, file.suffix in HEADERS or file.name == "Snakefile"


def commands(text: str, lines: bool) -> set[str]:
    """Lines of code blocks that are not Python, spans in backticks, and (``lines``) lines that begin with a command."""
    fence = r"^```([^\n`]*)\n(.*?)^```"
    found = [
        x
        for kind, block in re.findall(fence, text, re.M | re.S)
        if not kind.startswith(("python", "{"))
        for x in re.sub(r"\s*\\\n\s*", " ", block).splitlines()
    ]
    rest = re.sub(fence, "", text, flags=re.M | re.S)
    found += re.findall(rf"`((?:{WORDS})\s[^`]+)`", rest)
    if lines:
        found += re.findall(rf"^ *((?:[A-Z]+=\S+ )?(?:{WORDS}|\S+\.sh) .*)$", rest, re.M)
    said = {re.sub(r"\s+#.*", "", re.sub(r"\s*\n\s*", " ", x)).replace("\\|", "|").strip() for x in found}
    return {x for x in said if x} - NAMES


def documented() -> dict[str, list[str]]:
    """Command: the documents that show it."""
    seen: dict[str, list[str]] = {}
    for name, text, lines in documents():
        for command in commands(text, lines):
            seen.setdefault(command, []).append(name)
    return seen


SAMPLE = "--model runs/mine/cr8 --task aime24 --method dms --chains 8 --length 16384"


# Ways to try a command; each takes the place, a directory whose name has a space, and the command as documented.


def dms(words: list[str]) -> None:
    from companion.cli.main import main

    assert main(words) == 0, shlex.join(["dms", *words])


def whole(more: str = "", **stand_ins: str):
    """`dms` as it stands, in this process, but for words put in place of others and options that make it short."""

    def run(place: Path, command: str) -> None:
        words = shlex.split(re.sub(r"[][]", "", command))
        dms([stand_ins.get(word.removeprefix("$"), word) for word in words[1:]] + shlex.split(more))

    return run


def each_help(place: Path, command: str) -> None:
    from companion.cli.main import app

    for registered in app.registered_commands:
        dms([registered.name, "--help"])


def parse(words: list[str]) -> None:
    """Every word through the real parsers of torchrun and dms; no body is entered."""
    from torch.distributed.run import get_args_parser
    from typer.main import get_command

    from companion.cli.app import spread
    from companion.cli.main import app

    if words[0] == "torchrun":
        given = get_args_parser().parse_args(words[1:])
        assert given.module and given.training_script == "companion.cli.main"
        words = ["dms", *given.training_script_args]
    commands, seen = get_command(app), []
    for command in commands.commands.values():
        command.callback = lambda **options: seen.append(options)
    commands.main(spread(commands, words[1:]), prog_name="dms", standalone_mode=False)
    assert len(seen) == 1, shlex.join(words)


def parsed(why: str, **stand_ins: str):
    """Not run whole, for the reason given.  Alternatives, a|b, are parsed one by one."""

    def run(place: Path, command: str) -> None:
        command = re.sub(r"\w+=\$\((.*)\)", r"\1", command)
        words = shlex.split(re.sub(r"[][]", "", command).replace("...", SAMPLE))
        words = [stand_ins.get(word.removeprefix("$"), word) for word in words]
        several = next((word.split("|") for word in words if "|" in word), [""])
        for one in several:
            parse([one if "|" in word else word for word in words])

    return run


def python(*more: str):
    """`python -m MODULE` or a file, in this process; without ``more`` up to its parser, which reads the words."""

    def run(place: Path, command: str) -> None:
        first, *rest = command.split()[1:]
        module, words = (rest[0], rest[1:]) if first == "-m" else (None, rest)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sys, "argv", [str(ROOT / first), *words, *more])
            if not more:
                patch.setattr(argparse.ArgumentParser, "parse_args", read_and_stop)
            patch.chdir(place)
            with pytest.raises(SystemExit) if not more or module is None else contextlib.nullcontext():
                if module:
                    runpy.run_module(module, run_name="__main__")
                else:
                    runpy.run_path(str(ROOT / first), run_name="__main__")

    return run


def read_and_stop(parser, arguments=None, namespace=None, parse=argparse.ArgumentParser.parse_args):
    parse(parser, arguments, namespace)
    raise SystemExit(0)


def first_run(place: Path, command: str) -> None:
    words = command.replace("DIR", "'the results'").replace("[STEP ...]", "sanitizer")
    subprocess.run([sys.executable, *shlex.split(words)[1:]], cwd=place / "checkout", check=True)
    assert (place / "checkout" / "the results" / "steps.json").exists()


def make_says(place: Path, command: str) -> None:
    """make tells what it would do: these install from the network, or take minutes."""
    done = subprocess.run(["make", "-n", *command.split()[1:]], cwd=place / "checkout", capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout, done.stdout + done.stderr
    assert "GROUPS" not in command or "'.[book,dev]'" in done.stdout


def make_does(place: Path, command: str) -> None:
    """make with a stand-in for a Python that has a card, which notes how it was called."""
    noted = place / "called.json"
    stand_in = place.parent / "python"
    stand_in.write_text(
        f"#!{sys.executable}\nimport json, os, sys\n"
        f"json.dump([sys.argv, os.environ['PYTHONPATH']], open({str(noted)!r}, 'w'))\n"
    )
    stand_in.chmod(0o755)
    words = [word.replace("DIR", "the results") for word in command.split()]
    subprocess.run([*words, f"PYTHON={stand_in}"], cwd=place / "checkout", check=True, capture_output=True)
    called, path = json.loads(noted.read_text())
    assert path == f"{place / 'checkout'}:{place / 'checkout' / 'kernels'}"
    assert "OUT" not in command or called[-1] == "the results"


def papermill(place: Path, command: str) -> None:
    """Parameters are filled in, and all of them are the notebook's; test_reproduce.py executes all notebooks."""
    import nbformat
    from papermill.cli import papermill as run

    from companion.book import check_parameters

    words = shlex.split(command)[1:]
    run(["--prepare-only", str(ROOT / words[0]), *words[1:]], standalone_mode=False)
    injected = [c for c in nbformat.read(words[1], 4).cells if "injected-parameters" in c.metadata.get("tags", [])]
    given = {node.targets[0].id for node in ast.parse(injected[0].source).body if isinstance(node, ast.Assign)}
    assert len(given) == len(re.findall(r" -[py] ", command))
    check_parameters(ROOT / words[0], given)


def elsewhere(test: str, why: str):
    """Another test runs it."""

    def look(place: Path, command: str) -> None:
        file, _, text = test.partition("::")
        assert text in (ROOT / "tests" / file).read_text()

    return look


def loop(place: Path, command: str) -> None:
    """bash runs the loop as it stands, `...` completed; `dms` notes its words, which its parser reads then."""
    tools, noted = place / "tools", place / "noted.txt"
    tools.mkdir()
    (tools / "dms").write_text(f'#!/bin/bash\necho "$CUDA_VISIBLE_DEVICES $*" >> {shlex.quote(str(noted))}\n')
    (tools / "dms").chmod(0o755)
    environment = {**os.environ, "PATH": f"{tools}:{os.environ['PATH']}"}
    subprocess.run(["bash", "-c", command.replace("...", SAMPLE)], cwd=place, env=environment, check=True)
    calls = sorted(noted.read_text().splitlines())
    assert [call[0] for call in calls] == list("0123")
    for number, call in enumerate(calls, 1):
        assert f"--shard {number}/4" in call
        parse(["dms", *call.split()[1:]])


def shell_script(place: Path, command: str) -> None:
    """bash reads a script that needs what is not here: root and Slurm."""
    script = next(word for word in command.split() if word.endswith(".sh"))
    subprocess.run(["bash", "-n", ROOT / script], check=True)
    assert os.access(ROOT / script, os.X_OK)


def batch_script(place: Path, command: str) -> None:
    """bash checks the script, and the parsers what it starts on each node."""
    script = ROOT / command.split()[1]
    subprocess.run(["bash", "-n", script], check=True)
    started = re.search(r"^srun \S*(torchrun.*)", script.read_text().replace("\\\n", " "), re.M | re.S)
    parse(shlex.split(re.sub(r'"\$@"', "", re.sub(r"\$SLURM_NNODES", "4", started[1]))))
