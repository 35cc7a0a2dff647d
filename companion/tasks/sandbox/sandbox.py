"""Run untrusted programs: bubblewrap, resource limits, and a clock outside.

A program sees a read-only system (/usr, /lib*, /bin and the running Python), an empty /tmp of limited size, no
network, no home directory, no other process, and no capability; it cannot gain privileges.  Everything that it started
dies with its process namespace.  What it should have printed is compared outside, and never shown to it.

A limit on the number of processes does not bind root.  So root's sandbox keeps root's namespace, and gives up root for
a user that nothing else uses, inside, before the program is read; anybody else's gets a user namespace of its own.
Not covered: a bug of the kernel that a system call reaches, since no call is filtered.
"""

import contextlib
import itertools
import json
import os
import selectors
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path

INSIDE = Path(__file__).with_name("inside.py").read_text(encoding="utf-8")
SCRATCH = 64 << 20  # bytes of /tmp
FREE_UID = 50_000  # and the 10 000 above it: unused on the usual systems
RUNS = itertools.count()  # each run its own user, or their processes would be counted together


class SandboxError(ValueError):
    """There is no sandbox on this machine, and running without one was not allowed."""


@dataclass(frozen=True)
class Limits:
    """What a program may use.  Memory counts for each of its processes."""

    wall: float = 10.0  # seconds
    cpu: int | None = 6  # seconds
    memory: int | None = 2 << 30  # bytes of address space
    processes: int | None = 8  # and threads
    output: int = 16 << 20  # bytes on standard output, and of any file


@dataclass(frozen=True)
class Result:
    """How a program ended: ``status`` is "ok" (exit status 0), "failed", "time" or "output"."""

    status: str
    stdout: str
    stderr: str  # its last 2000 characters


def run(
    program: str, stdin: str = "", call: str | None = None, limits: Limits | None = None, unsafe: bool = False
) -> Result:
    """Run ``program``, Python source, on one input and return its Result.

    call: a function's name: it gets one JSON value a line of ``stdin`` as arguments, and its value is returned as JSON.
    unsafe: run without bubblewrap where there is none; limits on time, memory and output hold all the same.
    Raises SandboxError where bubblewrap cannot run and ``unsafe`` is False.
    """
    limits = limits or Limits()
    with tempfile.TemporaryFile() as source, tempfile.TemporaryFile() as given:
        for file, text in ((source, program), (given, stdin)):
            file.write(text.encode("utf-8", "surrogatepass"))
            file.seek(0)
        settings = {"mode": "program", "program": source.fileno(), "call": call, **asdict(limits)}
        process = launch(settings, unsafe, stdin=given, stderr=subprocess.PIPE, pass_fds=(source.fileno(),))
        try:
            return _watch(process, limits)
        finally:
            stop(process)


def launch(settings: dict, unsafe: bool, extra: tuple[str, ...] = (), **popen) -> subprocess.Popen:
    """Start ``inside.py`` with these settings; directories ``extra`` can be read, too.  ``stop`` it in the end.

    Raises SandboxError unless programs can be confined here or ``unsafe`` is set.
    """
    reason = why_not()
    if reason and not unsafe:
        raise SandboxError(
            f"programs cannot be confined here: {reason}. Install bubblewrap (apt-get install bubblewrap), grade the "
            "records on another machine (dms grade), or accept that programs written by a model run with all your "
            "rights: unsafe=True, --unsafe-execution"
        )
    if reason is None:
        command, settings = _wrapped(settings, extra)
    else:  # the limit on processes counts all of the user's
        command, settings = [], {**settings, "processes": None}
    python = [sys.executable, "-I", "-B", "-c", INSIDE, json.dumps(settings)]
    environment = {"PATH": "/usr/bin:/bin", "LANG": "C.UTF-8", "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    return subprocess.Popen(
        [*command, *python], stdout=subprocess.PIPE, start_new_session=True, cwd="/", env=environment, **popen
    )


def stop(process: subprocess.Popen) -> None:
    """Kill it and everything that it started; bubblewrap's namespace falls with it."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    for pipe in (process.stdin, process.stdout, process.stderr):
        if pipe:
            pipe.close()


@lru_cache(maxsize=1)
def why_not() -> str | None:
    """Why there is no sandbox on this machine; None where one has just been tried."""
    if shutil.which("bwrap") is None:
        return "bwrap (bubblewrap) is not installed"
    command = [*_wrapped({}, ())[0], sys.executable, "-I", "-c", "print(42)"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, cwd="/")
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"bwrap does not run ({error})"
    if done.returncode or done.stdout.strip() != "42":
        return f"bwrap does not run ({done.stderr.strip()[-300:] or f'status {done.returncode}'})"
    return None


def _wrapped(settings: dict, extra: tuple[str, ...]) -> tuple[list[str], dict]:
    """bubblewrap's command line, and the settings with the user to become."""
    root = os.geteuid() == 0
    command = ["bwrap", "--unshare-ipc", "--unshare-pid", "--unshare-net", "--unshare-uts", "--unshare-cgroup-try"]
    command += ["--die-with-parent", "--new-session", "--cap-drop", "ALL"]
    if root:
        settings = {**settings, "uid": FREE_UID + (os.getpid() + 97 * next(RUNS)) % 10_000}
        command += ["--cap-add", "CAP_SETUID", "--cap-add", "CAP_SETGID"]
    else:
        command += ["--unshare-user", "--uid", "65534", "--gid", "65534"]
    command += ["--proc", "/proc", "--dev", "/dev", "--size", str(SCRATCH), "--perms", "1777", "--tmpfs", "/tmp"]
    command += ["--perms", "0755", "--dir", "/etc"]  # which bwrap would make for its owner alone
    for path in ("/usr", "/bin", "/lib", "/lib32", "/lib64", "/etc/alternatives", "/etc/ld.so.cache"):
        command += ["--ro-bind-try", path, path]
    for path in dict.fromkeys((sys.base_prefix, sys.prefix, *extra)):
        if not Path(path).resolve().is_relative_to("/usr"):
            for parent in list(Path(path).parents)[-2::-1]:  # bwrap would copy modes such as that of /root
                command += ["--perms", "0755", "--dir", str(parent)]
            command += ["--ro-bind", path, path]
    return [*command, "--remount-ro", "/dev", "--remount-ro", "/", "--chdir", "/tmp", "--"], settings


def _watch(process: subprocess.Popen, limits: Limits) -> Result:
    """Read what the program writes until it ends, its time is over, or it has written too much."""
    deadline = time.monotonic() + limits.wall
    out, err, status = bytearray(), bytearray(), None
    with selectors.DefaultSelector() as waiting:
        waiting.register(process.stdout, selectors.EVENT_READ, out)
        waiting.register(process.stderr, selectors.EVENT_READ, err)
        while waiting.get_map() and status is None:
            ready = waiting.select(max(deadline - time.monotonic(), 0))
            for key, _ in ready:
                piece = os.read(key.fd, 1 << 16)
                key.data.extend(piece)
                if not piece:
                    waiting.unregister(key.fileobj)
            del err[:-2000]
            if len(out) > limits.output:
                status = "output"
            elif time.monotonic() >= deadline:
                status = "time"
    if status is None:
        try:
            code = process.wait(max(deadline - time.monotonic(), 0))
            killed = code in (-signal.SIGXCPU, 128 + signal.SIGXCPU, -signal.SIGKILL, 128 + signal.SIGKILL)
            status = "ok" if code == 0 else "time" if killed else "failed"
        except subprocess.TimeoutExpired:
            status = "time"
    return Result(status, out[: limits.output].decode("utf-8", "replace"), err.decode("utf-8", "replace"))
