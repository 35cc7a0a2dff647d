"""Graders in a process of their own, so that a time limit holds in any thread and a crash is one wrong answer.

Math-Verify's own limits use SIGALRM, which works in the main thread only.  reasoning-gym's scorers partly evaluate the
answer as an expression: they run in the sandbox or, if asked for explicitly, without.
"""

import atexit
import importlib.util
import json
import os
import selectors
import subprocess
import threading
import time
from dataclasses import asdict
from functools import lru_cache
from pathlib import Path

from companion.tasks.sandbox import sandbox

HERE = str(Path(__file__).parent)  # of math_answers
START = 120.0  # seconds to import a grader
SECONDS = 10.0  # for one answer
LIMITS = sandbox.Limits(cpu=None, memory=4 << 30, processes=64)


class Worker:
    """One grader process, started when first asked and again after it was killed."""

    def __init__(self, grader: str, unsafe: bool, module: str | None = None, seconds: float = SECONDS) -> None:
        """module: what the grader imports of a package that may be missing, which is then a ValueError."""
        self.grader, self.unsafe, self.seconds, self.path = grader, unsafe, seconds, (HERE,)
        if module is not None:
            found, package = importlib.util.find_spec(module), module.replace("_", "-")
            if found is None:
                raise ValueError(f"{package} is not installed: pip install {package}, or this project's extra [eval]")
            self.path = (str(Path(found.origin).parents[1]), HERE)
        self.lock, self.process, self.owner = threading.Lock(), None, None
        atexit.register(self.close)

    def ask(self, request: dict):
        """The grader's value, or None where it raised, crashed or took too long."""
        with self.lock:
            if self.process is None or self.owner != os.getpid() or self.process.poll() is not None:
                self._start()
            try:
                self.process.stdin.write(json.dumps(request).encode() + b"\n")
                self.process.stdin.flush()
                answer = self._line(self.seconds)
            except BrokenPipeError:
                answer = None
            if answer is None:
                self.close()
                return None
            return answer.get("value")

    def close(self) -> None:
        if self.process is not None and self.owner == os.getpid():
            sandbox.stop(self.process)
        self.process = None

    def _start(self) -> None:
        self.close()
        settings = {"mode": "serve", "grader": self.grader, "path": self.path, **asdict(LIMITS)}
        pipes = {"stdin": subprocess.PIPE, "stderr": subprocess.DEVNULL}
        self.process, self.owner = sandbox.launch(settings, self.unsafe, self.path, **pipes), os.getpid()
        if self._line(START) is None:
            self.close()
            raise RuntimeError(f"the {self.grader} grader did not start")

    def _line(self, seconds: float) -> dict | None:
        """The next line of the process, or None where it ends, takes longer, or writes something else."""
        deadline, data = time.monotonic() + seconds, bytearray()
        with selectors.DefaultSelector() as waiting:
            waiting.register(self.process.stdout, selectors.EVENT_READ)
            while not data.endswith(b"\n"):
                if not waiting.select(max(deadline - time.monotonic(), 0)):
                    return None
                piece = os.read(self.process.stdout.fileno(), 1 << 16)
                if not piece:
                    return None
                data += piece
        try:
            return json.loads(data)
        except (ValueError, RecursionError):
            return None


@lru_cache(maxsize=1)
def math_worker() -> Worker:
    """Math-Verify: it parses, and evaluates nothing, so that it also runs where there is no sandbox."""
    return Worker("math", unsafe=True, module="math_verify")


@lru_cache(maxsize=2)
def gym_worker(unsafe: bool) -> Worker:
    """reasoning-gym; asking it raises SandboxError where there is no sandbox and ``unsafe`` is False."""
    return Worker("gym", unsafe, "reasoning_gym")


@lru_cache(maxsize=1)
def check_worker() -> Worker:
    """Checkers, programs of ours; without a sandbox where there is none."""
    return Worker("check", unsafe=True)
