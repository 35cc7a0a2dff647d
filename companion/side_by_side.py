"""Calls, some of which need others, run side by side, each in a process of its own."""

import multiprocessing
import os
import re
import sys
import time
from collections.abc import Callable, Sequence
from graphlib import TopologicalSorter
from multiprocessing.process import BaseProcess
from pathlib import Path

from tqdm import tqdm

SHOWN = re.compile(r"\d+/\d+ \[[^,\]]*")  # of a bar of tqdm: how far, time so far and to go


def run_side_by_side(
    calls: dict[str, Callable[[], object]], needs: dict[str, Sequence[str]], logs: Path, preload: Sequence[str] = ()
) -> dict:
    """Make each call once those that it ``needs`` are done, up to four at once, in this order: {name: seconds}.

    The cores are shared out: on two, a call has one thread, since two side by side are faster than one after the other
    with two threads each.  What calls print goes to ``logs``/NAME.log.  Calls can be pickled.

    preload: modules that are imported once for all calls, where processes can be forked.

    Raises RuntimeError with the end of the log of each call that failed, after all that does not need it is done.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    at_once = min(cores, 4)
    logs.mkdir(parents=True, exist_ok=True)
    start = _starter(preload, cores // at_once)
    order, ready, running, seconds, failed = TopologicalSorter(needs), [], {}, {}, []
    order.prepare()
    bar = tqdm(total=len(calls), desc="stages and notebooks", dynamic_ncols=True, disable=None)
    try:
        while True:
            ready = sorted([*ready, *order.get_ready()], key=list(calls).index)
            while ready and len(running) < at_once:
                name = ready.pop(0)
                running[name] = start(calls[name], logs / f"{name}.log"), time.time()
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


def _starter(preload: Sequence[str], threads: int) -> Callable[[Callable, Path], BaseProcess]:
    """What starts a call, in a copy of a process that has imported the modules and that many threads."""
    forks = "forkserver" in multiprocessing.get_all_start_methods()
    context = multiprocessing.get_context("forkserver" if forks else "spawn")
    if forks:
        context.set_forkserver_preload(list(preload))

    def start(call: Callable, log: Path) -> BaseProcess:
        log.write_text("")
        before = dict(os.environ)
        os.environ["OMP_NUM_THREADS"] = str(threads)  # libraries read it when they are loaded
        try:
            process = context.Process(target=_logged, args=(call, log, threads))
            process.start()
        finally:
            os.environ.clear()
            os.environ.update(before)
        return process

    return start


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
