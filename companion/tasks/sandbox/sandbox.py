"""Run untrusted programs: bubblewrap, a filter of system calls, resource limits, and a clock outside.

A program sees a read-only system (/usr, /lib*, /bin and the running Python), an empty /tmp of limited size, no
network, no home directory, no other process, and no capability; it cannot gain privileges.  Everything that it started
dies with its process namespace.  What it should have printed is compared outside, and never shown to it.

A limit on the number of processes does not bind root.  So root's sandbox keeps root's namespace, and gives up root for
a user that nothing else uses, inside, before the program is read; anybody else's gets a user namespace of its own.
Where systemd makes cgroups, memory is limited for a run as a whole, elsewhere for each of its processes (``holds``).
Not covered: a bug of the kernel in a call that ordinary programs need, and what processors leak to their neighbours.
"""

import contextlib
import itertools
import json
import os
import platform
import selectors
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from pathlib import Path

from companion.tasks.sandbox.syscalls import seccomp_filter

INSIDE = Path(__file__).with_name("inside.py").read_text(encoding="utf-8")
SCRATCH = 64 << 20  # bytes of /tmp
FREE_UID = 50_000  # and the 10 000 above it: unused on the usual systems
RUNS = itertools.count()  # each run its own user, or their processes would be counted together
BUS = ("XDG_RUNTIME_DIR", "DBUS_SESSION_BUS_ADDRESS")  # how a user's systemd is reached


class SandboxError(ValueError):
    """There is no sandbox on this machine, and running without one was not allowed."""


@dataclass(frozen=True)
class Limits:
    """What a program may use.  Memory counts for each of its processes, and in a cgroup for all of them together."""

    wall: float = 10.0  # seconds
    cpu: int | None = 6  # seconds
    memory: int | None = 2 << 30  # bytes of address space; in a cgroup of what is used
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
    Raises SandboxError where bubblewrap cannot run and ``unsafe`` is False, and where the program was not even begun,
    twice: no wrong program is to blame for that.
    """
    for _ in range(2):
        result = _run(program, stdin, call, limits or Limits(), unsafe)
        if result.stdout.startswith("\0"):
            return replace(result, stdout=result.stdout[1:])
    raise SandboxError(f"a program could not be started ({result.stderr.strip()[-300:] or result.status})")


def _run(program: str, stdin: str, call: str | None, limits: Limits, unsafe: bool) -> Result:
    """One try; what it printed stands behind a zero byte, which ``inside.py`` writes as it begins."""
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
        return _start(*_wrapped(settings, extra), **popen)
    return _start([], {**settings, "processes": None}, **popen)  # the limit on processes counts all of the user's


def stop(process: subprocess.Popen) -> None:
    """Kill it and everything that it started: of bubblewrap first the namespace, so that what it held is free now."""
    if "bwrap" in process.args and process.poll() is None:
        with contextlib.suppress(OSError, subprocess.TimeoutExpired):
            for child in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split():
                os.kill(int(child), signal.SIGKILL)
            process.wait(5)  # it ends after its child, the namespace's first process, and that after all others
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
    try:
        process = _start(*_wrapped({"mode": "nothing"}, ()), stderr=subprocess.PIPE)
        try:
            said, complaint = process.communicate(timeout=60)
        finally:
            stop(process)
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"bwrap does not run ({error})"
    if process.returncode or said.strip() != b"confined":
        complaint = complaint.decode(errors="replace").strip()[-300:]
        return f"bwrap does not run ({complaint or f'status {process.returncode}'})"
    return None


def holds() -> dict[str, str]:
    """What limits a program here: {"sandbox", "system calls", "memory"}, each in a few words."""
    reason = why_not()
    calls = "filtered" if seccomp_filter() else f"not filtered: their numbers on {platform.machine()} are not known"
    memory = "by a cgroup for a whole run" if _scope() else "by RLIMIT_AS for each process"
    return {
        "sandbox": f"none: {reason}" if reason else "bubblewrap",
        "system calls": "not filtered" if reason else calls,
        "memory": "by RLIMIT_AS for each process" if reason else memory,
    }


@lru_cache(maxsize=1)
def _scope() -> tuple[str, ...]:
    """The command that puts another one into a cgroup of its own; () where systemd makes none for this user."""
    command = ("systemd-run", "--scope", "--quiet", "--collect", *(("--user",) if os.geteuid() else ()))
    try:
        done = subprocess.run([*command, "--property=MemoryMax=64M", "true"], capture_output=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return ()
    return () if done.returncode else command


def _start(command: list[str], settings: dict, pass_fds: tuple[int, ...] = (), **popen) -> subprocess.Popen:
    """``inside.py`` behind ``command``, which may name the file descriptor of the filter by {filter}."""
    python = [sys.executable, "-I", "-B", "-c", INSIDE, json.dumps(settings)]
    environment = {"PATH": "/usr/bin:/bin", "LANG": "C.UTF-8", "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    if command and command[0] == "systemd-run":
        environment |= {name: os.environ[name] for name in BUS if name in os.environ}
    with _pipe(seccomp_filter()) as read:
        words = [str(read) if word == "{filter}" else word for word in command]
        return subprocess.Popen(
            [*words, *python],
            stdout=subprocess.PIPE,
            start_new_session=True,
            cwd="/",
            env=environment,
            pass_fds=(*pass_fds, read),
            **popen,
        )


@contextlib.contextmanager
def _pipe(data: bytes) -> Iterator[int]:
    """The read end of a pipe that holds ``data``, some hundred bytes."""
    read, write = os.pipe()
    try:
        os.write(write, data)
        os.close(write)
        yield read
    finally:
        os.close(read)


def _wrapped(settings: dict, extra: tuple[str, ...]) -> tuple[list[str], dict]:
    """bubblewrap's command line, in a cgroup where there is one, and the settings with the user to become."""
    root = os.geteuid() == 0
    command = [*_scope()]
    if command and settings.get("memory"):
        command += [f"--property=MemoryMax={settings['memory']}", "--property=MemorySwapMax=0"]
    command += ["bwrap", "--unshare-ipc", "--unshare-pid", "--unshare-net", "--unshare-uts", "--unshare-cgroup-try"]
    command += ["--die-with-parent", "--new-session", "--cap-drop", "ALL"]
    command += [word for name in BUS for word in ("--unsetenv", name)]
    if seccomp_filter():
        command += ["--seccomp", "{filter}"]
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
            if len(out) > limits.output + 1:
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
    return Result(status, out[: limits.output + 1].decode("utf-8", "replace"), err.decode("utf-8", "replace"))
