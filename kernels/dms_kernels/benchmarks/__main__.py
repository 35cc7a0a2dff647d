"""``python -m dms_kernels.benchmarks KIND --device cuda --save FILE``: needs torch alone, unlike ``dms bench``.

A case is a line of JSON in FILE, written as soon as it is measured; a case that fails leaves its error there, and the
next one follows.
"""

import argparse
import json
import sys

import torch

from dms_kernels.benchmarks import KINDS, cases, run


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m dms_kernels.benchmarks", description=__doc__.splitlines()[0])
    parser.add_argument("kind", choices=list(KINDS))
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=("cpu", "cuda"))
    parser.add_argument("--save", required=True, metavar="FILE")
    parser.add_argument("--quick", action="store_true", help="tiny shapes, to see that it runs")
    given = parser.parse_args()
    card = torch.cuda.get_device_name() if given.device == "cuda" else "cpu"
    failed = 0
    for case in cases(given.kind, given.device, given.quick):
        try:
            (row,) = run(given.kind, given.device, [case.name], quick=given.quick)
        except Exception as error:  # whatever it is: the other cases are still wanted
            row, failed = {"name": case.name, "error": f"{type(error).__name__}: {error}"}, 1
        line = json.dumps({"device": card, "torch": torch.__version__, **row})
        print(line, flush=True)
        with open(given.save, "a") as file:
            file.write(line + "\n")
    return failed


if __name__ == "__main__":
    sys.exit(main())
