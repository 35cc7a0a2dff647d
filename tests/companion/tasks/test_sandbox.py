"""Hostile programs: each is contained, scored as failed, and the next program runs as if nothing had been."""

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from companion.tasks.base import TaskProblem
from companion.tasks.livecodebench import LiveCodeBench
from companion.tasks.sandbox import sandbox
from companion.tasks.sandbox.sandbox import Limits, SandboxError, run

confined = pytest.mark.sandbox
QUICK = Limits(wall=20, cpu=2)


@pytest.fixture
def grader():
    """Grades one program against one test: input 4, expected output 42."""
    task = object.__new__(LiveCodeBench)
    task.unsafe, task.limits = False, QUICK
    case = json.dumps([{"input": "4\n", "output": "42\n"}])
    secret = {"public_test_cases": case, "private_test_cases": "[]", "function": None}
    return lambda program: task.correct(program, TaskProblem("p", "", None, secret=secret))


GOOD = "print(int(input()) + 38)"


@confined
def test_right_program_passes_and_wrong_program_fails(grader):
    assert grader(GOOD) and not grader("print(41)") and not grader("print(42); 1 / 0") and not grader("print(42")


@confined
def test_a_program_that_the_sandbox_did_not_start_is_tried_again_and_not_called_wrong(grader, monkeypatch):
    assert grader(GOOD)
    wrapped, failing = sandbox._wrapped, [True]

    def broken(settings, extra):
        command, settings = wrapped(settings, extra)
        return ["false" if word == "bwrap" and failing.pop() else word for word in command], settings

    monkeypatch.setattr(sandbox, "_wrapped", broken)
    failing[:] = [False, True]
    assert grader(GOOD)
    failing[:] = [True, True]
    with pytest.raises(SandboxError, match="a program could not be started"):
        grader(GOOD)


FORKS = "import os\nwhile True:\n    try:\n        os.fork()\n    except OSError:\n        pass\n"


@confined
def test_fork_bomb_ends_at_wall_limit_and_leaves_no_process(grader):
    began = time.monotonic()
    result = run("print(42, flush=True)\n" + FORKS, limits=Limits(wall=2, cpu=30))
    assert result.status == "time" and time.monotonic() - began < 30
    for _ in range(100):
        left = subprocess.run(["ps", "-eo", "args"], capture_output=True, text=True).stdout.count('"mode": "program"')
        if not left:
            break
        time.sleep(0.1)
    assert not left
    assert grader(GOOD)


@confined
def test_process_limit_counts_each_run_alone():
    count = (
        "import os\nn = 0\ntry:\n    while True:\n        if not os.fork():\n            import time; time.sleep(9)\n"
    )
    count += "        n += 1\nexcept OSError:\n    print(n)\n"
    counted, threads = [], [threading.Thread(target=lambda: counted.append(run(count).stdout)) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    alone = int(run(count).stdout)
    assert 0 < alone <= Limits().processes and counted == [f"{alone}\n"] * 2


@confined
@pytest.mark.parametrize(
    "program, status",
    [
        ("x = bytearray(8 << 30); print(42)", "failed"),
        ("x = []\nwhile True: x.append(bytearray(64 << 20))", "failed"),
        ("while True: pass", "time"),
        ("import time\ntime.sleep(600)", "time"),
        ("import os, time\nos.close(1); os.close(2)\ntime.sleep(600)", "time"),
        ("while True: print('42' * 10_000)", "output"),
        ("import sys\nwhile True: sys.stderr.write('42' * 10_000)", "time"),
        ("open('/tmp/x', 'wb').write(bytes(32 << 20)); print(42)", "failed"),
        ("for i in range(9): open(f'/tmp/{i}', 'wb').write(bytes(15 << 20))\nprint(42)", "failed"),
    ],
    ids=["allocation", "growth", "loop", "sleep", "silent sleep", "flood", "stderr flood", "large file", "full disk"],
)
def test_memory_time_output_and_files_are_limited(program, status):
    began = time.monotonic()
    assert run(program, limits=Limits(wall=6, cpu=4, memory=512 << 20)).status == status
    assert time.monotonic() - began < 30


@confined
def test_network_is_unreachable():
    server = socket.create_server(("127.0.0.1", 0))
    server.settimeout(0)
    connect = "import socket\nsocket.create_connection(({!r}, {}), 3)\nprint(42)"
    assert run(connect.format("127.0.0.1", server.getsockname()[1])).status == "failed"
    assert "Network is unreachable" in run(connect.format("192.0.2.1", 80)).stderr
    with pytest.raises(BlockingIOError):
        server.accept()
    server.close()


@confined
def test_user_files_are_neither_readable_nor_writable(tmp_path, monkeypatch):
    secret = tmp_path / "secret"
    secret.write_text("42")
    program = f"import pathlib\nprint(pathlib.Path({str(secret)!r}).read_text())"
    assert "FileNotFoundError" in run(program).stderr
    home, here = str(Path.home()), str(Path(__file__).parents[3])
    listing = "import os\nfor path in {}:\n    print(sorted(os.listdir(path)) if os.path.isdir(path) else [])"
    seen = [eval(line) for line in run(listing.format([home, here, "/etc", "/sys"])).stdout.splitlines()]
    mounted = {
        Path(p).relative_to(home).parts[0] for p in (sys.prefix, sys.base_prefix) if Path(p).is_relative_to(home)
    }
    assert set(seen[0]) <= mounted and "passwd" not in seen[2] and not seen[3]
    if not Path(sys.prefix).is_relative_to(here):
        assert not seen[1]
    monkeypatch.setenv("SECRET", "42")
    assert "SECRET" not in run("import os\nprint(dict(os.environ))").stdout
    places = ["/x", "/usr/x", "/dev/x", "/dev/shm/x", f"{sys.prefix}/x", str(tmp_path / "x"), "/proc/sys/kernel/x"]
    for place in places:
        assert run(f"open({place!r}, 'w').write('42')").status == "failed", place
    assert [file.name for file in tmp_path.iterdir()] == ["secret"]


@confined
def test_program_reaches_no_other_process_and_gains_no_privilege(grader):
    for target in ("os.getppid()", "1", "-1", str(os.getpid())):
        program = f"import os\ntry:\n    os.kill({target}, {int(signal.SIGKILL)})\nexcept OSError as e:\n    print(e)\n"
        program += "print(sorted(int(p) for p in os.listdir('/proc') if p.isdigit()))\nprint(42)"
        assert not grader(program)
    status = dict(
        line.split(":\t") for line in run("print(open('/proc/self/status').read())").stdout.split("\n") if line
    )
    assert int(status["CapEff"], 16) == int(status["CapPrm"], 16) == 0 and status["NoNewPrivs"] == "1"
    assert "0" not in status["Uid"].split("\t")
    assert run("import os\nos.setuid(0)").status == "failed"
    assert run("import resource as r\nr.setrlimit(r.RLIMIT_NPROC, (99, 99))").status == "failed"
    assert grader(GOOD)


@confined
def test_expected_output_is_absent_inside_the_sandbox(grader):
    """A program looks through every file, argument and descriptor that it can open for a marker in the test file."""
    case = json.dumps([{"input": "4\n", "output": "marker-" + "of-the-output"}])
    search = """
import os
found = set()
places = [f"/proc/{p}/{f}" for p in os.listdir("/proc") if p.isdigit() for f in ("cmdline", "environ")]
places += [f"/proc/self/fd/{n}" for n in range(64)]
for top in ("/tmp", "/run", "/var", "/home", "/root", "/mnt", "/opt"):
    for folder, _, files in os.walk(top):
        if "/lib/python" in folder: continue
        places += [os.path.join(folder, f) for f in files]
for place in places:
    try:
        with open(place, "rb") as file:
            if b"marker-" + b"of-the-output" in file.read(1 << 20): found.add(place)
    except OSError: pass
print("marker-" + "of-the-output" if found else "nothing")
"""
    secret = {"public_test_cases": case, "private_test_cases": case, "function": None}
    task = object.__new__(LiveCodeBench)
    task.unsafe, task.limits = False, Limits(wall=30, cpu=10)
    assert not task.correct(search, TaskProblem("p", "", None, secret=secret))
    assert run(search, "4\n", limits=task.limits).stdout == "nothing\n"


@confined
@pytest.mark.skipif(os.geteuid() != 0, reason="tries the sandbox of an ordinary user, as root")
def test_unprivileged_sandbox_limits_processes(tmp_path, need_sandbox):
    python = "/usr/bin/python3"
    if not Path(python).exists():
        need_sandbox("no Python that an ordinary user can read")
    package = tmp_path / "companion" / "tasks" / "sandbox"
    package.mkdir(parents=True)
    for name in ("sandbox.py", "syscalls.py", "inside.py"):
        (package / name).write_text(Path(sandbox.__file__).with_name(name).read_text())
    script = "import os, sys; os.setgroups([]); os.setgid(65534); os.setuid(65534)\n"
    script = f"from companion.tasks.sandbox import sandbox; import os\n{script}"
    script = f"import sys; sys.path.insert(0, {str(tmp_path)!r})\n{script}"
    script += "print(sandbox.why_not())\n"
    script += f"r = sandbox.run({FORKS!r}, limits=sandbox.Limits(wall=2, cpu=30)); print(r.status)\n"
    script += "r = sandbox.run('import os; print(os.getuid())'); print(r.status, r.stdout)\n"
    done = subprocess.run([python, "-c", script], capture_output=True, text=True, timeout=120)
    why, *rest = done.stdout.split("\n")
    if why != "None":
        need_sandbox(f"no user namespaces for an ordinary user: {why}")
    assert rest[:2] == ["time", "ok 65534"], done.stderr


def test_missing_bubblewrap_rejects_programs_unless_unsafe(monkeypatch):
    monkeypatch.setattr(sandbox, "why_not", lambda: "bwrap (bubblewrap) is not installed")
    with pytest.raises(SandboxError, match=r"not installed.*dms grade.*--unsafe-execution"):
        run(GOOD, "4")
    assert run(GOOD, "4", unsafe=True).stdout == "42\n"
    assert run("while True: pass", limits=Limits(wall=20, cpu=1), unsafe=True).status == "time"
    assert run("x = bytearray(8 << 30)", unsafe=True).status == "failed"


def test_why_not_explains_missing_or_broken_bubblewrap(monkeypatch):
    monkeypatch.setattr(sandbox.shutil, "which", lambda name: None)
    assert "not installed" in sandbox.why_not.__wrapped__()
    monkeypatch.undo()
    monkeypatch.setattr(sandbox, "_wrapped", lambda settings, extra: (["false"], settings))
    assert "status 1" in (sandbox.why_not.__wrapped__() or "") or sandbox.shutil.which("bwrap") is None


@confined
def test_function_call_passes_json_and_ignores_prints():
    method = (
        "class Solution:\n    def f(self, a: List[int], b: str):\n        print('noise')\n        return (sum(a), b)"
    )
    assert json.loads(run(method, '[1, 2]\n"x"', call="f").stdout) == [3, "x"]
    assert json.loads(run("def f(n):\n    return gcd(n, 12)", "8", call="f").stdout) == 4
    assert run("def g(n): return n", "8", call="f").status == "failed"
    assert run("def f(n): return object()", "8", call="f").status == "failed"
    deep = "def f(n):\n    return 0 if n == 0 else 1 + f(n - 1)"
    assert json.loads(run(deep, "40000", call="f").stdout) == 40000
    assert run("import sys\nprint(42)\nsys.exit(1)").status == "ok"  # the protocol's runner counts what was printed
