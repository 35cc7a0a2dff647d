"""A list of faults, and what they are made of beside forks that die at a chosen place: full disks, damaged files."""

import contextlib
import ctypes
import os
import re
import resource
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

NEW_MOUNTS, NEW_USER, PRIVATE, REMOUNT = 0x20000, 0x10000000, 0x44000, 32
HOSTILE = (  # answers that ask the grader to make a file
    "__import__('os').system('touch {}')",
    "\\text{{__import__('os').system('touch {}')}}",
    "\\input{{|touch {}}}",
    "\\write18{{touch {}}}",
    "1+open('{}','w').close()",
    "(1).__class__.__base__.__subclasses__() + '{}'",
)


@dataclass(frozen=True)
class Fault:
    group: str
    what: str
    then: str
    run: Callable  # given a directory and the function that makes tiny models, returns what was said

    def row(self, said: str, directory: Path) -> str:
        said = re.sub(r"\s+", " ", said.replace(str(directory), "DIR")).replace("|", "\\|")
        return f"| {self.what} | {self.then} | {f'`{said}`' if said else ''} |"


FAULTS: dict[str, Fault] = {}


def fault(group: str, what: str, then: str):
    def register(run: Callable) -> Callable:
        FAULTS[run.__name__] = Fault(group, what, then, run)
        return run

    return register


def error_of(call: Callable) -> str:
    """What the one line on standard error would be; an AssertionError where the call ends well."""
    try:
        call()
    except (ValueError, OSError) as error:
        return str(error)
    raise AssertionError("no error")


@contextlib.contextmanager
def small_disk(directory: Path, size: int) -> Iterator[Callable[[], None]]:
    """For a child process: ``directory`` becomes a disk of ``size`` bytes; the function given makes it large.

    Where no file system may be mounted, files above ``size`` cannot be written instead (RLIMIT_FSIZE).
    """
    directory.mkdir(parents=True, exist_ok=True)
    libc, place, options = ctypes.CDLL(None, use_errno=True), os.fsencode(directory), b"size=%d,mode=777"
    user, group = os.geteuid(), os.getegid()
    mounted = libc.unshare(NEW_MOUNTS | (NEW_USER if user else 0)) == 0
    if mounted and user:
        for name, text in (("uid_map", f"0 {user} 1"), ("setgroups", "deny"), ("gid_map", f"0 {group} 1")):
            Path("/proc/self", name).write_text(text)
    mounted = mounted and libc.mount(b"none", b"/", None, PRIVATE, None) == 0
    if mounted and libc.mount(b"tmpfs", place, b"tmpfs", 0, options % size) == 0:
        yield lambda: libc.mount(b"tmpfs", place, b"tmpfs", REMOUNT, options % (1 << 26))
    else:
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
        yield lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def flip(file: Path) -> None:
    """One bit in the middle of a file."""
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
