"""Commands, some of which need others, run side by side."""

import os
import re
import subprocess
import sys
import time
from collections.abc import Sequence
from graphlib import TopologicalSorter
from pathlib import Path

from tqdm import tqdm

SHOWN = re.compile(r"\d+/\d+ \[[^,\]]*")  # of a bar of tqdm: how far, time so far and to go


def run_side_by_side(commands: dict[str, Sequence[str]], needs: dict[str, Sequence[str]], logs: Path) -> dict:
    """Run each command once those that it ``needs`` are done, up to four at once, in this order: {name: seconds}.

    The cores are shared out: on two, a command has one thread, since two side by side are faster than one after the
    other with two threads each.  What commands print goes to ``logs``/NAME.log.

    Raises RuntimeError with the end of the log of each command that failed, after all that does not need it is done.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    at_once = min(cores, 4)
    logs.mkdir(parents=True, exist_ok=True)
    order, ready, running, seconds, failed = TopologicalSorter(needs), [], {}, {}, []
    order.prepare()
    bar = tqdm(total=len(commands), desc="stages and notebooks", dynamic_ncols=True, disable=None)
    try:
        while True:
            ready = sorted([*ready, *order.get_ready()], key=list(commands).index)
            while ready and len(running) < at_once:
                name = ready.pop(0)
                running[name] = _start(commands[name], logs / f"{name}.log", cores // at_once), time.time()
            if not running:
                break
            time.sleep(0.5)
            bar.set_postfix_str("; ".join(f"{name} {_progress(logs / f'{name}.log')}".strip() for name in running))
            for name in [name for name, (process, _) in running.items() if process.poll() is not None]:
                process, began = running.pop(name)
                seconds[name] = round(time.time() - began, 1)
                if process.returncode:
                    failed.append(name)
                else:
                    order.done(name)
                bar.write(f"{name}: {'failed after ' if process.returncode else ''}{seconds[name]} s", file=sys.stderr)
                bar.update()
    finally:  # also after an interrupt; a stage goes on where it stopped
        bar.close()
        for process, _ in running.values():
            process.terminate()
            process.wait()
    if failed:
        _complain(failed, [name for name in commands if name not in seconds], logs)
    return seconds


def _start(command: Sequence[str], log: Path, threads: int) -> subprocess.Popen:
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    with log.open("w") as file:
        return subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, env=environment)


def _progress(log: Path) -> str:
    """How far the last bar in a log is."""
    found = SHOWN.findall(log.read_text(errors="replace")[-2000:])
    return found[-1] + "]" if found else ""


def _complain(failed: list[str], left_out: list[str], logs: Path) -> None:
    parts = [f"failed: {', '.join(failed)}" + (f"; not run: {', '.join(left_out)}" if left_out else "")]
    for name in failed:
        log = logs / f"{name}.log"
        lines = re.split(r"[\r\n]+", log.read_text(errors="replace").rstrip())
        parts.append("\n".join([f"{log}:", *lines[-20:]]))
    raise RuntimeError("\n\n".join(parts))
