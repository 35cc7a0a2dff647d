"""Mutation testing: a random sample of the mutants of each module named in pyproject.toml, and what no test noticed.

    python tests/support/mutants.py --most 60 --save data/results/mutation.json

mutmut changes one operator, number, argument or assignment of a function, and runs the tests that call the function.
Decorated functions (properties) and messages of errors are left alone.  A mutant that was killed is not tried again
until its function changes.  Judgements in the saved file are kept, and go with what a mutant changes.
"""

import argparse
import json
import random
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

from mutmut.configuration import config
from mutmut.mutation.data import SourceFileMutationData
from mutmut.mutation.diff_apply import get_diff_for_mutant
from mutmut.mutation.file_mutation import mutate_file_contents
from mutmut.stats import status_by_exit_code
from mutmut.utils.format_utils import get_mutant_name, orig_function_and_class_names_from_key

SEED = 0
NOTICED = ("killed", "timeout", "segfault")


def shuffled(path: str) -> list[str]:
    """Names of a file's mutants; a larger sample holds the smaller one."""
    names = [
        get_mutant_name(Path(path), name) for name in mutate_file_contents(path, Path(path).read_text()).mutant_names
    ]
    random.Random(SEED).shuffle(names)
    return names


def statuses(path: str) -> dict[str, str]:
    data = SourceFileMutationData(path=path)
    data.load()
    return {name: status_by_exit_code[code] for name, code in data.exit_code_by_key.items()}


def survivor(path: str, name: str, status: str) -> dict[str, str]:
    """Where the mutant is, and what it changes."""
    diff = get_diff_for_mutant(name, path=path).splitlines()[2:]
    old, new = ([line[1:].strip() for line in diff if line[0] == sign] for sign in "-+")
    lines, at = Path(path).read_text().splitlines(), 0
    function, owner = orig_function_and_class_names_from_key(name)
    for start in (f"class {owner}" if owner else "", f"def {function}(", old[0]):
        at = next(i for i, line in enumerate(lines[at:], at) if line.strip().startswith(start))
    return {"at": f"{path}:{at + 1}", "status": status, "change": f"{' '.join(old)}  =>  {' '.join(new)}"}


def report(path: str, sample: list[str], judged: dict[str, str]) -> dict:
    status, count = statuses(path), len(shuffled(path))
    left = [survivor(path, name, status[name]) for name in sample if status[name] not in NOTICED]
    left = [one | {"judgement": judged.get(one["change"], "")} for one in sorted(left, key=lambda one: one["at"])]
    killed = len(sample) - len(left)
    row = {"module": path, "mutants": count, "sampled": len(sample), "killed": killed, "survived": len(left)}
    return row | {"score": round(100 * killed / len(sample), 1), "survivors": left}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--most", type=int, default=60, help="mutants of a module")
    parser.add_argument("--only", default="", help="modules whose path holds this")
    parser.add_argument("--save", type=Path)
    options = parser.parse_args()
    samples = {path: shuffled(path)[: options.most] for path in config().only_mutate if options.only in path}
    known = {name: status for path in samples for name, status in statuses(path).items()}
    if names := [name for sample in samples.values() for name in sample if known.get(name) not in NOTICED]:
        subprocess.run([Path(sys.executable).with_name("mutmut"), "run", "--max-children", "1", *names], check=True)
    stored = json.loads(options.save.read_text())["modules"] if options.save and options.save.exists() else []
    judged = {one["change"]: one["judgement"] for row in stored for one in row["survivors"]}
    rows = {row["module"]: row for row in stored}
    for path, sample in samples.items():
        rows[path] = report(path, sample, judged)
        print({key: value for key, value in rows[path].items() if key != "survivors"})
        print(*(f"  {one['at']} {one['change']}" for one in rows[path]["survivors"]), sep="\n")
    if options.save:
        found = {"mutmut": version("mutmut"), "seed": SEED, "modules": list(rows.values())}
        options.save.write_text(json.dumps(found, indent=1, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()
