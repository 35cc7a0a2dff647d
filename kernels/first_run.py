"""The first run on a card, step by step (``make gpu-first-run OUT=DIR``).

    python kernels/first_run.py DIR [STEP ...]

A step is a process under a time limit of its own; whatever fails, the next one follows.  DIR keeps each step's output
(STEP.log), its results (JSON, a line a case), and what became of it (steps.json).
"""

import json
import shutil
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
KERNELS, MODEL = "tests/dms_kernels/", "tests/dms_core/test_gpu_model.py"
PYTEST = ["-m", "pytest", "-q", "-m", "gpu", "--maxfail", "8", "-p", "no:cacheprovider"]
SMOKE = ["-m", "dms_kernels.smoke"]
BENCH = ["-m", "dms_kernels.benchmarks", "--device", "cuda", "--save", "{out}/kernels.jsonl"]
STEPS = {  # name: seconds, arguments of Python
    "smoke": (300, SMOKE),
    "append-decode": (600, [*PYTEST, KERNELS + "test_append.py", KERNELS + "test_gpu_decode.py"]),
    "attention-model": (600, [*PYTEST, KERNELS + "test_gpu_attention.py", MODEL]),
    "bench-decode": (300, [*BENCH, "decode"]),
    "bench-cache": (120, [*BENCH, "cache"]),
    "bench-prefill": (300, [*BENCH, "prefill"]),
    "bench-train": (600, [*BENCH, "train"]),
    "whole-model": (300, ["-m", "companion.cost.decode_speed", "{out}/whole-model.jsonl"]),
    "sanitizer": (300, SMOKE),  # under compute-sanitizer, which is slow: what it does not reach is not lost before
}


def run(name: str, out: Path) -> dict:
    """One step: its exit status, None where time ran out, and seconds."""
    limit, arguments = STEPS[name]
    command = [sys.executable, *(argument.format(out=out) for argument in arguments)]
    if name == "sanitizer":
        if not (tool := shutil.which("compute-sanitizer") or shutil.which("/usr/local/cuda/bin/compute-sanitizer")):
            return {"step": name, "skipped": "no compute-sanitizer in PATH or /usr/local/cuda/bin"}
        command = [tool, *command]
    began = time.time()
    with open(out / f"{name}.log", "w") as log:
        try:
            code = subprocess.run(command, cwd=ROOT, stdout=log, stderr=subprocess.STDOUT, timeout=limit).returncode
        except subprocess.TimeoutExpired:
            code = None
    return {"step": name, "exit": code, "seconds": round(time.time() - began, 1), "limit": limit}


def main(out: Path, names: list[str]) -> int:
    """Exit status 0 where every step that ran ended with 0."""
    out.mkdir(parents=True, exist_ok=True)
    found = []
    for name in names or STEPS:
        found.append(run(name, out.resolve()))
        (out / "steps.json").write_text(json.dumps(found, indent=1) + "\n")
        print(json.dumps(found[-1]), flush=True)
    return int(any(step.get("exit", 0) != 0 for step in found))


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), sys.argv[2:]))
