"""``dms bench`` and ``dms kernels``: how fast the operations are here, and what they compile to."""

import importlib.util
import json
import os
import re
import sys
from importlib import metadata
from pathlib import Path

from companion import provenance as environment
from companion.paths import RESULTS

HELP = """\
  dms bench --json         {"device", "environment", "cases": [{"name", "kind", "shape", "rounds", "ours_ms",
                           "baseline_ms": {name: ms}, "ratio": {name: baseline over ours}, "quartiles_ms": {"ours":
                           [low, high], name: ...}, "gbps", "copy_gbps", "flops", "peak_bytes": {"ours", name: ...},
                           "notes": {name: why a baseline is missing}}]}; medians; gbps: 10^9 bytes a second that the
                           operation must move, copy_gbps: that a copy moves; peak_bytes: beyond what was held before;
                           "held_bytes" {"ours", name: ...} with cache
  dms kernels --json       {"torch", "triton", "devices": {"cpu", "cuda": {"name", "modules": {operation: module} or
                           null, "why": reason or null}}}
  dms kernels --aot --json {"triton", "cases": [{"kernel", "target", "registers", "spills", "shared", "limit", "stack",
                           "ok"}]}, shared, its limit and stack in bytes; status 1 if a case is not ok
"""


def add_commands(add) -> None:
    """``add(name, run, text)`` makes a command with --json."""
    command = add("bench", run_bench, "time an operation of dms_kernels against what one would use otherwise")
    command.add_argument("kind", metavar="KIND", help="prefill, train, decode or cache")
    command.add_argument("--device", default="cpu", help="cpu (default) or cuda")
    command.add_argument("--case", action="append", metavar="NAME", help="only this case; may be given repeatedly")
    command.add_argument("--repeats", type=int, help="timed rounds (default: what some seconds allow)")
    command.add_argument("--quick", action="store_true", help="tiny shapes, to see that it runs")
    command.add_argument("--save", nargs="?", const="", metavar="FILE",
                         help="merge into data/results/kernels-DEVICE.json, or into FILE")  # fmt: skip

    command = add("kernels", run_kernels, "which implementation serves which device; what the kernels compile to")
    command.add_argument("--aot", action="store_true", help="compile every Triton kernel; needs no card, takes minutes")
    command.add_argument("--target", type=int, nargs="+", metavar="SM", help="80, 90, 100 (default: all three)")
    command.set_defaults(passed=lambda result: all(case["ok"] for case in result.get("cases", [])))


def run_bench(args) -> dict:
    from dms_kernels import benchmarks

    if args.quick and args.save == "":
        raise ValueError("--quick with --save: tiny shapes are not kept among the results; name a file after --save")
    cases = benchmarks.run(args.kind, args.device, args.case, args.repeats, args.quick)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    facts = {**environment.describe(), "cores": cores}
    device = facts["device"] if args.device == "cuda" else "cpu"
    result = {"device": device, "environment": facts, "cases": cases}
    if args.save is not None:
        file = Path(args.save) if args.save else RESULTS / f"kernels-{slug(device)}.json"
        save(result, file)
        print(f"saved {file}", file=sys.stderr)
    if not args.json:
        for line in bench_lines(cases):
            print(line)
    return result


def slug(name: str) -> str:
    """A device's name as a part of a file name."""
    return re.sub("[^a-z0-9]+", "-", name.lower()).strip("-")


def save(result: dict, file: Path) -> None:
    """Put the cases into ``file`` in place of those of the same name; cases of another environment are dropped."""
    old = json.loads(file.read_text()) if file.exists() else {"environment": None, "cases": []}
    if old["environment"] == result["environment"]:
        cases = {case["name"]: case for case in [*old["cases"], *result["cases"]]}
        result = {**result, "cases": sorted(cases.values(), key=lambda case: (case["kind"], case["name"]))}
    elif old["cases"]:
        print(f"{file}: {len(old['cases'])} cases of another environment are dropped", file=sys.stderr)
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(result, indent=1) + "\n")


def bench_lines(cases: list[dict]) -> list[str]:
    """One line a case."""
    wide = max((len(case["name"]) for case in cases), default=0)
    lines = []
    for case in cases:
        others = [
            f"{name} {ms:9.2f} ms {case['ratio'][name]:7.2f}x" for name, ms in sorted(case["baseline_ms"].items())
        ]
        peak = [f"{name} {size / 1e6:.1f}" for name, size in case["peak_bytes"].items()]
        parts = [f"{case['name']:{wide}}  ours {case['ours_ms']:9.2f} ms", *others]
        parts.append(f"{case['gbps']:6.2f} GB/s (a copy {case['copy_gbps']:.1f})")
        parts.append(f"peak MB: {', '.join(peak)}")
        parts += [f"{name}: {note}" for name, note in case["notes"].items()]
        lines.append("   ".join(parts))
    return lines


def run_kernels(args) -> dict:
    if not args.aot:
        return show_implementations(args.json)
    from dms_kernels import aot

    targets = tuple(args.target or (80, 90, 100))
    try:
        cases = aot.report(targets)
    except ImportError as error:
        raise ValueError(str(error)) from error
    if not args.json:
        for case in cases:
            print(aot_line(case))
    return {"triton": metadata.version("triton"), "cases": cases}


def aot_line(case: dict) -> str:
    head = f"{case['kernel']:44} sm_{case['target']:<4}"
    if "error" in case:
        return f"{head} {case['error'].splitlines()[0]}"
    needs = f"{case['registers']:4} registers {case['spills']:4} spills {case['shared']:7} of {case['limit']} B shared"
    return f"{head} {needs}{'' if case['ok'] else '  NOT OK'}"


def show_implementations(quiet: bool) -> dict:
    """Which modules serve which device on this machine."""
    import torch

    from dms_kernels.backend import MODULES

    facts = environment.describe()
    triton = facts["packages"].get("triton")
    why = None if torch.cuda.is_available() else "torch finds no CUDA card"
    if why is None and importlib.util.find_spec("triton") is None:
        why = "triton is not installed"
    devices = {}
    for number, (device, name, lack) in enumerate([("cpu", facts["processor"], None), ("cuda", facts["device"], why)]):
        modules = {operation: f"dms_kernels.{names[number]}" for operation, names in MODULES.items()}
        devices[device] = {"name": name, "modules": None if lack else modules, "why": lack}
    if not quiet:
        for device, entry in devices.items():
            served = entry["modules"] or {"none": entry["why"]}
            print(f"{device:5}", *(f"{operation}: {module}" for operation, module in served.items()), sep="  ")
    return {"torch": facts["packages"]["torch"], "triton": triton, "devices": devices}
