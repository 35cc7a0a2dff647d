"""Compile every kernel at the configurations that are launched, without a GPU, and say what it needs.

Triton brings ptxas, cuobjdump and nvdisasm.  The compiler does not run where ``TRITON_INTERPRET`` is set, so the work
is done in child processes without it.  From a shell: ``python -m dms_kernels.aot --json``.

A whole sweep takes minutes; ``--save FILE`` keeps it with a hash of what was compiled (``sources``), by which a test
knows whether it still holds.
"""

import argparse
import hashlib
import importlib
import importlib.util
import inspect
import json
import os
import re
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from tqdm import tqdm

MODULES = ("forward", "backward", "decode", "append", "gate")  # of dms_kernels.gpu
SHARED_LIMIT = {80: 166912, 86: 101376, 90: 232448, 100: 232448}  # bytes a block may have; 86: and 89, 120
RESERVED = 1024  # bytes of shared memory that every block takes besides; a multiprocessor has SHARED_LIMIT and these
THREADS, REGISTERS = {80: 2048, 86: 1536, 90: 2048, 100: 2048}, 65536  # of a multiprocessor
TENSOR_CORES = {"wgmma": "wgmma.mma_async", "tcgen05": "tcgen05.mma", "mma": "mma.sync"}  # name: instruction of PTX
MISSING = "ahead-of-time compilation needs triton: pip install triton (Linux only)"


def report(targets: tuple[int, ...] = tuple(SHARED_LIMIT), jobs: int = 1, only: str | None = None) -> list[dict]:
    """One dict a kernel, configuration and target, sorted: {"kernel", "target", "launch", "registers", "spills",
    "shared", "limit", "stack", "blocks", "mma", "waits", "ok"}, with "error" where it does not compile.

    launch: constants, warps, stages; registers a thread; spills: instructions that touch local memory; shared and its
    limit in bytes a block; stack in bytes a thread; blocks: how many a multiprocessor holds at once; mma: which
    instruction of the tensor cores (wgmma, tcgen05, mma or None); waits: for each loop that waits for pipelined copies,
    how many may be still under way (0: none, so that their latency shows).  ``targets``: compute capabilities times
    ten; ``jobs``: processes; ``only``: a regular expression that the kernel's name must contain.  Raises ValueError for
    unknown targets, ImportError without triton.
    """
    if unknown := set(targets) - set(SHARED_LIMIT):
        raise ValueError(f"target {min(unknown)}: must be one of {', '.join(map(str, SHARED_LIMIT))}")
    if importlib.util.find_spec("triton") is None:
        raise ImportError(MISSING)
    with tqdm(total=0, desc="compiling", unit="kernel", file=sys.stderr) as bar, ThreadPoolExecutor(jobs) as pool:
        shares = list(pool.map(lambda n: _child(list(targets), n, jobs, only, bar), range(jobs)))
    return sorted((case for share in shares for case in share), key=lambda case: (case["kernel"], case["target"]))


def sources() -> str:
    """A hash of the code of all kernels, of how they are compiled, and of triton's release."""
    from importlib.metadata import version

    digest = hashlib.sha256(version("triton").encode())
    modules = (Path(__file__).parent / "gpu").glob("*.py")
    for file in sorted([Path(__file__), *(file for file in modules if b"@triton.jit" in file.read_bytes())]):
        digest.update(file.read_bytes())
    return digest.hexdigest()[:16]


def _clean_environment() -> dict[str, str]:
    """This process's environment without the interpreter, in which this package can be imported."""
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    roots = [str(Path(__file__).parents[1]), *filter(None, [env.get("PYTHONPATH")])]
    return {**env, "PYTHONPATH": os.pathsep.join(roots)}


def _child(targets: list[int], number: int, jobs: int, only: str | None, bar: tqdm) -> list[dict]:
    """Start child ``number`` of ``jobs`` and collect its lines."""
    code = f"from dms_kernels.aot import _work; _work({targets!r}, {number}, {jobs}, {only!r})"
    with tempfile.TemporaryFile("w+") as log:
        command = [sys.executable, "-c", code]
        child = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, text=True, env=_clean_environment())
        cases = []
        for line in child.stdout:
            if line.startswith('{"total"'):
                bar.total += json.loads(line)["total"]
                bar.refresh()
            elif line.startswith('{"kernel"'):
                cases.append(json.loads(line))
                bar.update()
        if child.wait():
            log.seek(0)
            raise RuntimeError(f"compiling ended with code {child.returncode}:\n{log.read()[-2000:]}")
    return cases


def _work(targets: list[int], number: int, jobs: int, only: str | None) -> None:
    """In a child: every ``jobs``-th case, one line of JSON each."""
    cases = []
    for target in targets:
        for module in MODULES:
            found = importlib.import_module(f"dms_kernels.gpu.{module}").aot_cases(target)
            cases += [(target, *case) for case in found if only is None or re.search(only, case[0])]
    mine = cases[number::jobs]
    print(json.dumps({"total": len(mine)}), flush=True)
    for case in mine:
        print(json.dumps(_compile(*case)), flush=True)


def _compile(target, name, kernel, signature, constants, options, attributes=None) -> dict:
    """Compile one case.  Attributes default to what torch gives: pointers aligned to 16 bytes."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = kernel.arg_names
    types = {arg: "constexpr" if arg in constants else signature[arg] for arg in names}
    if attributes is None:
        attributes = {arg: [["tt.divisibility", 16]] for arg, kind in types.items() if kind.startswith("*")}
    attributes = {(names.index(key),) if isinstance(key, str) else key: value for key, value in attributes.items()}
    launch = {**{name: value for name, value in constants.items() if value is not None}, **options}
    result = {"kernel": name, "target": target, "launch": launch}
    try:
        source = ASTSource(kernel, types, constants, attributes)
        compiled = triton.compile(source, target=GPUTarget("cuda", target, 32), options=dict(options))
    except Exception as error:
        return {**result, "error": f"{type(error).__name__}: {str(error)[:500]}", "ok": False}
    used = {**_resources(compiled.asm["cubin"]), "shared": compiled.metadata.shared, "limit": SHARED_LIMIT[target]}
    used |= {"blocks": _blocks(target, used["registers"], 32 * compiled.metadata.num_warps, used["shared"])}
    ptx = compiled.asm["ptx"]
    used |= {"mma": next((name for name, code in TENSOR_CORES.items() if code in ptx), None)}
    used |= {"waits": _waits(compiled.asm["ttgir"])}
    return {**result, **used, "ok": used["spills"] == 0 and used["shared"] <= used["limit"]}


def _resources(cubin: bytes) -> dict:
    """Registers and stack of a cubin's kernel, and how many of its instructions touch local memory."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        usage = _tool("cuobjdump", "--dump-resource-usage", path)
        found = re.search(r"REG:(\d+) STACK:(\d+)", usage)
        if found is None:
            raise RuntimeError(f"cuobjdump said nothing about registers:\n{usage}")
        registers, stack = map(int, found.groups())
        spills = 0  # without a stack there is nothing to spill to; disassembling takes as long as compiling
        if stack:
            spills = len(re.findall(r"\b(?:LDL|STL)\b", _tool("nvdisasm", "-c", path)))
    return {"registers": registers, "spills": spills, "stack": stack}


def _blocks(target: int, registers: int, threads: int, shared: int) -> int:
    """How many blocks a multiprocessor holds at once; registers come in units of 8 a thread."""
    by_registers = REGISTERS // (-(-registers // 8) * 8 * threads)
    by_shared = (SHARED_LIMIT[target] + RESERVED) // (shared + RESERVED)
    return min(by_registers, by_shared, THREADS[target] // threads)


def _waits(ttgir: str) -> list[int]:
    """For each loop with waits for asynchronous copies, the least number of groups of copies still under way."""
    loops, open_loops = [], []  # (indentation, waits)
    for line in ttgir.splitlines():
        text, indent = line.strip(), len(line) - len(line.lstrip())
        if "scf.for " in text:
            open_loops.append((indent, []))
            loops.append(open_loops[-1][1])
        elif open_loops and text.startswith("}") and indent == open_loops[-1][0]:
            open_loops.pop()
        elif open_loops and (found := re.search(r"ttg\.async_wait .*num = (\d+)", text)):
            open_loops[-1][1].append(int(found[1]))
    return [min(waits) for waits in loops if waits]


def _tool(name: str, *arguments) -> str:
    """Output of one of the CUDA tools that come with triton."""
    import triton

    program = Path(inspect.getfile(triton)).parent / "backends" / "nvidia" / "bin" / name
    return subprocess.run([program, *arguments], check=True, capture_output=True, text=True).stdout


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m dms_kernels.aot", description=__doc__.split("\n\n")[0])
    parser.add_argument("--json", action="store_true", help="one line of JSON instead of a table")
    parser.add_argument("--targets", type=int, nargs="+", default=list(SHARED_LIMIT), help="80, 86, 90, 100")
    parser.add_argument("--jobs", type=int, default=1, help="processes")
    parser.add_argument("--only", help="a regular expression that the kernel's name must contain")
    parser.add_argument("--save", type=Path, metavar="FILE", help="keep it with a hash of the sources, a line a case")
    chosen = parser.parse_args(arguments)
    try:
        cases = report(tuple(chosen.targets), chosen.jobs, chosen.only)
    except (ImportError, ValueError) as error:
        parser.error(str(error))
    from importlib.metadata import version

    if chosen.save:
        head = json.dumps({"triton": version("triton"), "sources": sources()})[:-1]
        chosen.save.write_text(f'{head}, "cases": [\n' + ",\n".join(map(json.dumps, cases)) + "\n]}\n")
    if chosen.json:
        print(json.dumps({"triton": version("triton"), "cases": cases}))
    else:
        for case in cases:
            print(_line(case))
    return 0 if all(case["ok"] for case in cases) else 1


def _line(case: dict) -> str:
    if "error" in case:
        return f"{case['kernel']:40} sm_{case['target']:<4} {case['error'].splitlines()[0]}"
    needs = f"{case['registers']:4} registers {case['spills']:4} spills {case['shared']:7} of {case['limit']} B shared"
    needs += f" {case['blocks']:2} blocks {case['mma'] or '-':7} waits {case['waits']}"
    return f"{case['kernel']:40} sm_{case['target']:<4} {needs}" + ("" if case["ok"] else "  TOO MUCH")


if __name__ == "__main__":
    sys.exit(main())
