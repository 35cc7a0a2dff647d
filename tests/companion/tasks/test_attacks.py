"""The sandbox attacked by a written list, which SECURITY.md repeats: each attack is refused, and the next program runs.

A program prints what it met; what must be printed stands beside it, so that an attack that never began does not pass.
"""

import fcntl
import os
import platform
import re
import struct
import sys
from pathlib import Path

import pytest
from faulty import HOSTILE

from companion.tasks.sandbox import sandbox
from companion.tasks.sandbox.sandbox import Limits, run
from companion.tasks.sandbox.syscalls import MACHINES, NAMES, seccomp_filter

ROOT = Path(__file__).parents[3]
COLUMN = MACHINES.get(platform.machine(), (0,))[0]
NUMBERS = {name: numbers[COLUMN] for name, numbers in NAMES.items()}
CLONE, SOCKET = (56, 41) if COLUMN == 0 else (220, 198)
filtered = pytest.mark.skipif(not seccomp_filter(), reason=f"no filter for {platform.machine()}")

HEAD = f"""
import ctypes, errno, os, signal, subprocess, sys, time
libc, NUMBERS = ctypes.CDLL(None, use_errno=True), {NUMBERS}
def call(number, *arguments):
    result = libc.syscall(ctypes.c_long(number), *map(ctypes.c_long, arguments or [0] * 6))
    return "done" if result >= 0 else errno.errorcode[ctypes.get_errno()]
def tried(do):
    try:
        do()
        return "done"
    except OSError as error:
        return errno.errorcode[error.errno]
"""

ATTACKS = {  # name: program, what it must print
    "io_uring": ("print(call(425, 8, 0), call(426), call(427))", "ENOSYS ENOSYS ENOSYS"),
    "ptrace of a sibling": (
        """
child = os.fork()
if not child:
    time.sleep(60)
buffer = ctypes.create_string_buffer(16)
print(call(NUMBERS["ptrace"], 16, child, 0, 0), call(NUMBERS["process_vm_readv"], child, 0, 0, 0, 0, 0))
print(tried(lambda: open(f"/proc/{child}/mem", "rb").read(1)) != "done", call(438, child, 1, 0))
os.kill(child, 9)
""",
        "EPERM EPERM\nTrue ENOSYS",
    ),
    "/proc of the host": (
        """
pids = [p for p in os.listdir("/proc") if p.isdigit()]
told = b"".join(open(f"/proc/{p}/cmdline", "rb").read() for p in pids)
print(len(pids) <= 3, told.count(b"pyt" + b"est"))
for place in ("sysrq-trigger", "kcore", "sys/kernel/core_pattern"):
    print(tried(lambda: open("/proc/" + place, "r+b")) != "done", end=" ")
print(tried(lambda: os.listdir("/proc/1/root/root")) != "done", tried(lambda: os.listdir("/sys/kernel")))
""",
        "True 0\nTrue True True True ENOENT",
    ),
    "user namespaces inside": (
        f"""
print(call(NUMBERS["unshare"], 0x10000000), call({CLONE}, 0x10000000 | 17, 0, 0, 0, 0), call(435, 0, 0))
print(call(NUMBERS["setns"], 0, 0), subprocess.run(["unshare", "-Ur", "true"], stderr=-3).returncode != 0)
""",
        "EPERM EPERM ENOSYS\nEPERM True",
    ),
    "setuid binaries": (
        """
mounts = [line.split() for line in open("/proc/self/mounts")]
print([m[1] for m in mounts if "nosuid" not in m[3].split(",")])
print([line.split()[1] for line in open("/proc/self/status") if line.startswith("NoNewPrivs")])
done = subprocess.run(["su", "-c", "id -u"], capture_output=True, text=True, stdin=-3)
print(done.returncode != 0, "0" in done.stdout)
""",
        "[]\n['1']\nTrue False",
    ),
    "symlinks out of the work directory": (
        """
for target in ({secret!r}, "/proc/1/root" + {secret!r}, "../../.." + {secret!r}, "/etc/shadow"):
    os.symlink(target, "/tmp/out")
    print(tried(lambda: open("/tmp/out")), tried(lambda: open("/tmp/out", "w")) != "done", end=" ")
    os.unlink("/tmp/out")
""",
        "ENOENT True EACCES True ENOENT True ENOENT True",
    ),
    "a 10 GB sparse file": (
        """
with open("/tmp/x", "wb") as file:
    print(tried(lambda: file.truncate(10 << 30)), tried(lambda: os.posix_fallocate(file.fileno(), 0, 10 << 30)))
print(tried(lambda: os.truncate(os.memfd_create("x"), 10 << 30)), os.stat("/tmp/x").st_size)
""",
        "EFBIG EFBIG\nEFBIG 0",
    ),
    "sockets of the kernel and of the virtual machine": (
        f"print(*[call({SOCKET}, family, 1, 0) for family in (16, 17, 38, 40)])",
        "EAFNOSUPPORT EAFNOSUPPORT EAFNOSUPPORT EAFNOSUPPORT",
    ),
    "mounts, keys, BPF, modules, clocks": (
        "print({call(number, *[0] * 6) for number in NUMBERS.values()})",
        "{'EPERM'}",
    ),
    "calls of kernels to come": ("print({call(number) for number in range(450, 600)})", "{'ENOSYS'}"),
}


@pytest.fixture(scope="module", autouse=True)
def next_program_runs():
    yield
    if not sandbox.why_not():
        assert run("print(int(input()) + 38)", "4").stdout == "42\n"


@filtered
@pytest.mark.sandbox
@pytest.mark.parametrize("name", ATTACKS)
def test_attack_is_refused(name, tmp_path):
    program, expected = ATTACKS[name]
    (tmp_path / "secret").write_text("42")
    ran = run(HEAD + program.replace("{secret!r}", repr(str(tmp_path / "secret"))), limits=Limits(wall=20))
    assert (ran.stdout.strip(), ran.status) == (expected, "ok"), ran.stderr
    assert [file.read_text() for file in tmp_path.iterdir()] == ["42"]


@pytest.mark.sandbox
def test_signals_to_the_parents_group_reach_nobody_outside():
    ours = os.getpgid(0)
    for target in (
        "os.killpg(0, 9)",
        "os.kill(0, 9)",
        "os.kill(-1, 9)",
        f"os.killpg({ours}, 9)",
        f"os.kill({ours}, 9)",
    ):
        ran = run(f"import os\nprint('began', flush=True)\n{target}\nprint('survived')")
        assert ran.stdout.startswith("began") and os.getpgid(0) == ours


@pytest.mark.sandbox
def test_lock_held_at_the_time_limit_is_free_afterwards():
    """A file that can only be read can be locked all the same, and it is the host's."""
    program = f"import fcntl, time\nfile = open({sys.executable!r}, 'rb')\nfcntl.flock(file, fcntl.LOCK_EX)\n"
    ran = run(program + "print('locked', flush=True)\ntime.sleep(600)", limits=Limits(wall=2))
    assert (ran.status, ran.stdout) == ("time", "locked\n")
    with open(sys.executable, "rb") as file:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)


@filtered
@pytest.mark.sandbox
@pytest.mark.skipif(platform.machine() != "x86_64", reason="calls of 32-bit programs on x86_64")
def test_calls_by_the_32_bit_entry_end_the_program():
    program = """
import ctypes, mmap
code = mmap.mmap(-1, 4096, prot=7)
code.write(b"\\xb8\\x14\\x00\\x00\\x00\\xcd\\x80\\xc3")  # getpid by int 0x80
print("began", flush=True)
print(ctypes.CFUNCTYPE(ctypes.c_int)(ctypes.addressof(ctypes.c_char.from_buffer(code)))())
"""
    ran = run(program)
    assert (ran.status, ran.stdout) == ("failed", "began\n")


def test_numbers_of_calls_are_those_of_the_kernels_headers():
    """Where the compiler's headers are installed; they do not change."""
    headers = {0: "/usr/include/x86_64-linux-gnu/asm/unistd_64.h", 1: "/usr/include/asm-generic/unistd.h"}
    for column, header in headers.items():
        if Path(header).exists():
            lines = (line.split() for line in Path(header).read_text().splitlines())
            known = {words[1].rpartition("__NR")[2]: words[2] for words in lines if len(words) == 3}
            for name, numbers in NAMES.items():
                assert known.get(f"_{name}", known.get(f"3264_{name}")) == str(numbers[column]), name


@pytest.mark.parametrize("machine", MACHINES)
def test_filter_ends_every_path_and_jumps_stay_inside(machine):
    code = [
        struct.unpack("=HBBI", seccomp_filter(machine)[i : i + 8]) for i in range(0, len(seccomp_filter(machine)), 8)
    ]
    assert len(code) < 4096 and code[-1] == (0x06, 0, 0, 0x7FFF0000)
    assert all(at + max(yes, no) < len(code) - 1 for at, (_, yes, no, _) in enumerate(code[:-1]))
    assert seccomp_filter("riscv64") == b""


def test_run_is_put_into_a_cgroup_where_systemd_makes_one(tmp_path, monkeypatch, need_sandbox):
    """With a stand-in for systemd-run that notes its words and goes on with the rest of them."""
    need_sandbox()
    stand_in = tmp_path / "systemd-run"
    stand_in.write_text(
        f'#!/bin/sh\nwhile [ "${{1#-}}" != "$1" ]; do echo "$1" >> {tmp_path}/words; shift; done\nexec "$@"\n'
    )
    stand_in.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setenv("XDG_RUNTIME_DIR", "/run/user/1")
    found = sandbox._scope.__wrapped__()
    assert found[:2] == ("systemd-run", "--scope")
    monkeypatch.setattr(sandbox, "_scope", lambda: (str(stand_in), *found[1:]))
    assert sandbox.holds() == {
        "sandbox": "bubblewrap",
        "system calls": "filtered",
        "memory": "by a cgroup for a whole run",
    }
    ran = run("import os\nprint(sorted(os.environ))", limits=Limits(memory=300 << 20))
    assert ran.status == "ok" and "XDG_RUNTIME_DIR" not in ran.stdout
    words = (tmp_path / "words").read_text().split()
    assert {f"--property=MemoryMax={300 << 20}", "--property=MemorySwapMax=0"} <= set(words)


def test_limits_that_hold_are_told(monkeypatch):
    monkeypatch.setattr(sandbox, "why_not", lambda: "no bubblewrap")
    told = {"sandbox": "none: no bubblewrap", "system calls": "not filtered", "memory": "by RLIMIT_AS for each process"}
    assert sandbox.holds() == told


def test_security_page_lists_these_attacks():
    page = " ".join((ROOT / "SECURITY.md").read_text().split())
    assert [name for name in ATTACKS if name not in page] == []


def test_math_verify_evaluates_numbers_alone(monkeypatch):
    """What reaches sympy's evaluator, the only one that there is."""
    pytest.importorskip("math_verify")
    monkeypatch.syspath_prepend(str(Path(sandbox.__file__).parent))
    import math_answers

    pytest.importorskip("sympy.physics.units")  # whose names are evaluated as it is imported
    from sympy.parsing import sympy_parser

    seen = []

    def watched(code, *spaces):
        seen.append(code)
        return eval(code, *spaces)

    monkeypatch.setattr(sympy_parser, "eval", watched, raising=False)
    for answer in (
        *HOSTILE,
        "[1, exit()]",
        "x_{exit()}",
        "\\operatorname{exit}()",
        "\\sin(exit())",
        "a.__class__",
        "'a'*3",
    ):
        assert not math_answers.equal("5", answer.format("/tmp/made") if "touch" in answer else answer)
    assert math_answers.equal("5", "2+3") and seen
    assert [code for code in seen if not re.fullmatch(r"(Integer|Float) \('?[\d.]+' ?\)|Integer \(\d+ \)", code)] == []
