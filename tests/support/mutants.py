"""Mutation testing: a random sample of the mutants of each module, and what no test noticed.

    python tests/support/mutants.py --most 60 --save data/results/mutation.json

mutmut makes the mutants: one operator, number, argument or assignment of a function is another.  Each is tested in a
fork that has torch already, by the tests of its module and until one fails, for at most LIMIT seconds.  Left alone are
decorated functions (properties) and messages of errors.  Judgements in the saved file are kept, and go with what a
mutant changes.
"""

import argparse
import difflib
import json
import os
import random
import signal
import sys
from collections.abc import Iterator
from contextlib import redirect_stderr, redirect_stdout
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.metadata import version
from itertools import islice
from pathlib import Path

import pytest
import torch
from mutmut.mutation.file_mutation import create_mutations

ROOT = Path(__file__).parents[2]
CACHE = ("cache/test_base.py", "cache/test_dms.py", "cache/test_slack.py")
ELSEWHERE = (  # what other tests say of caches: other devices, captured steps
    "../test_accelerator.py::test_path_on_the_accelerator_equals_the_cpu[rows]",
    "test_graphs.py::test_steps_that_change_shapes_are_not_captured",
)
TESTS = {
    "visibility": ("test_visibility.py",),
    "gate": ("test_gate.py",),
    "budgets.pareto": ("budgets/test_pareto.py",),
    "budgets.voting": ("budgets/test_voting.py", "budgets/test_curves.py"),
    "cache.base": (
        *CACHE,
        *ELSEWHERE,
        "cache/test_prefix.py::test_layers_that_cannot_take_back_tokens_refuse_slack",
        "baselines/test_baselines.py::test_layer_equals_its_definition",
    ),
    "cache.dms": (*CACHE, *ELSEWHERE, "cache/test_int8_pages.py"),
    "cache.pages": CACHE,
}
SLOW = "simulated_reruns or cover_the_truth or speculation"
SEED, LIMIT = 0, 600


class Mutated(MetaPathFinder, Loader):
    """Imports one module from a source of its own."""

    def __init__(self, name: str, source: str) -> None:
        self.name, self.source = name, source

    def find_spec(self, name, path, target=None):
        return ModuleSpec(name, self) if name == self.name else None

    def exec_module(self, module):
        exec(compile(self.source, f"mutated {self.name}", "exec"), module.__dict__)


def mutants(path: Path) -> tuple[int, Iterator[str]]:
    """How many a file has, and their sources in an order drawn with SEED: a larger sample holds the smaller one."""
    source = path.read_text()
    module, mutations, *_ = create_mutations(str(path), source)
    inside = [one for one in mutations if one.contained_by_top_level_function is not None]
    random.Random(SEED).shuffle(inside)
    made = (module.deep_replace(one.original_node, one.mutated_node).code for one in inside)
    return len(inside), (one for one in made if one != source and "raise " not in change(source, one)[1])


def change(source: str, mutated: str) -> tuple[int, str]:
    """The first line that differs, and how."""
    old, new = source.splitlines(), mutated.splitlines()
    tag = next(
        tag for tag in difflib.SequenceMatcher(None, old, new, autojunk=False).get_opcodes() if tag[0] != "equal"
    )
    was, now = (" ".join(line.strip() for line in lines) for lines in (old[tag[1] : tag[2]], new[tag[3] : tag[4]]))
    return tag[1] + 1, f"{was}  =>  {now}"


def run(short: str, *options: str) -> int:
    files = [str(ROOT / "tests/dms_core" / test) for test in TESTS[short]]
    always = ["-x", "-qq", "-p", "no:cacheprovider", "--hypothesis-profile", "mutants", "-k", f"not ({SLOW})"]
    with open(os.devnull, "w") as null, redirect_stdout(null), redirect_stderr(null):
        return int(pytest.main([*always, *options, *files]))


def noticed(name: str, source: str) -> bool:
    """Whether a test of the module fails, or does not end."""
    if (child := os.fork()) == 0:
        signal.alarm(LIMIT)
        sys.meta_path.insert(0, Mutated(name, source))
        for loaded in [one for one in sys.modules if one.split(".")[0] in ("dms_core", "tests", "conftest")]:
            del sys.modules[loaded]
        os._exit(run(name.removeprefix("dms_core.")))
    return os.waitpid(child, 0)[1] != 0


def survey(short: str, most: int, judged: dict[str, str]) -> dict:
    path, name, left = ROOT / "dms_core" / f"{short.replace('.', '/')}.py", f"dms_core.{short}", []
    source, (count, every) = path.read_text(), mutants(path)
    run(short, "--collect-only")  # imports here what every fork needs
    if noticed(name, source):
        raise SystemExit(f"{name}: its tests fail without any mutation")
    for tried, mutated in enumerate(islice(every, most), 1):  # noqa: B007
        if noticed(name, mutated):
            print(".", end="", flush=True)
        else:
            line, what = change(source, mutated)
            left.append({"at": f"{path.relative_to(ROOT)}:{line}", "change": what, "judgement": judged.get(what, "")})
            print(f"\n{left[-1]['at']} {what}", flush=True)
    killed = tried - len(left)
    row = {"module": name, "mutants": count, "tried": tried, "killed": killed, "survived": len(left)}
    return row | {"score": round(100 * killed / tried, 1), "survivors": sorted(left, key=lambda one: one["at"])}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--most", type=int, default=60, help="mutants of a module")
    parser.add_argument("--only", nargs="*", choices=TESTS, default=list(TESTS), help="modules")
    parser.add_argument("--save", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    stored = json.loads(options.save.read_text())["modules"] if options.save and options.save.exists() else []
    rows, judged = {row["module"]: row for row in stored}, {}
    for row in stored:
        judged |= {one["change"]: one["judgement"] for one in row["survivors"]}
    for short in options.only:
        row = survey(short, options.most, judged)
        print("", {key: value for key, value in row.items() if key != "survivors"}, sep="\n", flush=True)
        rows[row["module"]] = row
        if options.save:
            found = {"mutmut": version("mutmut"), "seed": SEED, "modules": list(rows.values())}
            options.save.write_text(json.dumps(found, indent=1, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()
