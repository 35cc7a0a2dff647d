"""Calls, some of which need others, run side by side, each in a process of its own."""

import contextlib
import multiprocessing
import os
import re
import sys
import time
from collections.abc import Callable, Sequence
from graphlib import TopologicalSorter
from multiprocessing import forkserver
from multiprocessing.process import BaseProcess
from pathlib import Path

from tqdm import tqdm

FORKS = "forkserver" in multiprocessing.get_all_start_methods()
CONTEXT = multiprocessing.get_context("forkserver" if FORKS else "spawn")
COSTLY = (  # imports of stages and chapters; those that are not installed are left out
    "companion.book",
    "companion.experiments.main",
    "dms_kernels.cpu.compiled",
    "ipykernel.kernelapp",
    "seaborn",
)
SHOWN = re.compile(r"\d+/\d+ \[[^,\]]*")  # of a bar of tqdm: how far, time so far and to go


def prepare(modules: Sequence[str] = COSTLY) -> None:
    """Begin to import modules in the process of which calls will be copies, where processes can be forked."""
    if FORKS:
        CONTEXT.set_forkserver_preload(list(modules))
        with _threads(_share()[1]):
            forkserver.ensure_running()


def run_side_by_side(calls: dict[str, Callable[[], object]], needs: dict[str, Sequence[str]], logs: Path) -> dict:
    """Make each call once those that it ``needs`` are done, up to four at once, in this order: {name: seconds}.

    The cores are shared out: on two, a call has one thread, since two side by side are faster than one after the other
    with two threads each.  What calls print goes to ``logs``/NAME.log.  Calls must be picklable.

    Raises RuntimeError with the end of the log of each call that failed, after all that does not need it is done.
    """
    at_once, threads = _share()
    logs.mkdir(parents=True, exist_ok=True)
    order, ready, running, seconds, failed = TopologicalSorter(needs), [], {}, {}, []
    order.prepare()
    bar = tqdm(total=len(calls), desc="stages and notebooks", dynamic_ncols=True, disable=None)
    try:
        while True:
            ready = sorted([*ready, *order.get_ready()], key=list(calls).index)
            while ready and len(running) < at_once:
                name = ready.pop(0)
                running[name] = _start(calls[name], logs / f"{name}.log", threads), time.time()
            if not running:
                break
            time.sleep(0.5)
            bar.set_postfix_str("; ".join(f"{name} {_progress(logs / f'{name}.log')}".strip() for name in running))
            for name in [name for name, (process, _) in running.items() if process.exitcode is not None]:
                process, began = running.pop(name)
                seconds[name] = round(time.time() - began, 1)
                if process.exitcode:
                    failed.append(name)
                else:
                    order.done(name)
                bar.write(f"{name}: {'failed after ' if process.exitcode else ''}{seconds[name]} s", file=sys.stderr)
                bar.update()
    finally:  # also after an interrupt; a stage goes on where it stopped
        bar.close()
        for process, _ in running.values():
            process.terminate()
            process.join()
    if failed:
        _complain(failed, [name for name in calls if name not in seconds], logs)
    return seconds


def _share() -> tuple[int, int]:
    """Calls at once, and threads for each."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(cores, 4), cores // min(cores, 4)


@contextlib.contextmanager
def _threads(number: int):
    """Processes started inside have so many; libraries read it when they are loaded."""
    before = dict(os.environ)
    os.environ["OMP_NUM_THREADS"] = str(number)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


def _start(call: Callable, log: Path, threads: int) -> BaseProcess:
    log.write_text("")
    process = CONTEXT.Process(target=_logged, args=(call, log, threads))
    with _threads(threads):
        process.start()
    return process


def _logged(call: Callable, log: Path, threads: int) -> None:
    os.environ["OMP_NUM_THREADS"] = str(threads)
    with log.open("a") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    call()


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
