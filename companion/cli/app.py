"""The application behind ``dms``: how a command is registered, runs and prints."""

import functools
import inspect
import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer

from companion.cli.results import SHAPES, describe

app = typer.Typer(
    help="The companion's commands.  With --json they print one JSON object on the last line of standard output, which "
    "the help of each describes.",
    context_settings={"help_option_names": ["-h", "--help"]},
    rich_markup_mode="rich",
)
PANELS = ("Reproduce", "Retrofit", "Sample and grade", "Measure", "Inspect", "Batch")  # groups of commands in the help


def opt(kind, text: str, *names: str, **more):
    """The annotation of an option.

    Its metavar says how many values it takes: "L..." one or more, "[FILE]" one or none ("" then), "KEY VALUE" two,
    which arrive as KEY=VALUE; any other one.
    """
    return Annotated[kind, typer.Option(*names, help=text, **more)]


def at_least_one(**values: int | None) -> None:
    """Raises ValueError for an option below 1."""
    for name, value in values.items():
        if value is not None and value < 1:
            raise ValueError(f"--{name.replace('_', '-')} {value}: must be >= 1")


def arg(kind, text: str, metavar: str):
    """The annotation of a positional argument."""
    return Annotated[kind, typer.Argument(help=text, metavar=metavar)]


Json = opt(bool, "print the result as JSON, last", "--json")
Profile = opt(str, "smoke or tiny")
Runs = opt(Path, "where results are kept and reused", metavar="DIR")
Device = opt(str, "cpu, cuda, cuda:1, ... (default: cuda where there is one)")
Seed = opt(int, "of the retrofit's documents and of sampling")


def command(panel: str, name: str, passed: Callable[[dict], bool] = lambda result: True) -> Callable:
    """Register a function as the command ``name``; it gets the option --json.

    The function returns the result, ready for JSON.  If it is a generator, lines that it yields are printed as they
    come, but not with --json.  A parameter ``as_json`` tells it which.
    What it prints stands in results.yaml.  passed: is the exit status 0?
    """
    # an opening bracket before a letter would be markup
    lines = [f"dms {key} --json  {describe(shape)}" for key, shape in SHAPES.items() if key.split()[0] == name]
    epilog = re.sub(r"\[(?=[a-z])", r"\\[", "\n".join(lines))

    def register(function: Callable) -> Callable:
        parameters = dict(inspect.signature(function).parameters)
        asks = parameters.pop("as_json", None)

        @functools.wraps(function)
        def run(*, as_json: bool, **options) -> None:
            made = function(**options, **({"as_json": as_json} if asks else {}))
            while inspect.isgenerator(made):
                try:
                    line = next(made)
                    if not as_json:
                        print(line, flush=True)
                except StopIteration as end:
                    made = end.value
            if as_json and not int(os.environ.get("RANK", 0)):  # under torchrun the first process speaks
                print(json.dumps(made))
            if not passed(made):
                raise typer.Exit(1)

        kind = inspect.Parameter.KEYWORD_ONLY
        flag = inspect.Parameter("as_json", kind, default=False, annotation=Json)
        run.__signature__ = inspect.Signature([*(p.replace(kind=kind) for p in parameters.values()), flag])
        run.__annotations__ = {p.name: p.annotation for p in run.__signature__.parameters.values()}
        app.command(name, rich_help_panel=panel, epilog=epilog)(run)
        return function

    return register


def spread(commands, words: list[str]) -> list[str]:
    """A command line as its parser takes it: one value an option (see ``opt``)."""
    chosen = commands.commands.get(words[0]) if words else None
    kinds = {flag: p.metavar or "" for p in (chosen.params if chosen else ()) for flag in p.opts if flag[0] == "-"}
    groups: list[list[str]] = [[]]
    for word in words:
        if re.match(r"-\D", word):
            groups.append([])
        groups[-1].append(word)
    result = groups[0]
    for flag, *values in groups[1:]:
        if kinds.get(flag, "").endswith("...") and values:
            result += [word for value in values for word in (flag, value)]
        elif kinds.get(flag, "").startswith("["):
            result += [flag, *(values or [""])]
        elif kinds.get(flag) == "KEY VALUE":
            result += [flag, "=".join(values[:2]), *values[2:]]
        else:
            result += [flag, *values]
    return result
