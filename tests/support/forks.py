"""Programs in copies of this process: importing torch, transformers and the packages takes ten seconds, a copy none."""

import contextlib
import ctypes
import json
import os
import shlex
import signal
import socket
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path

ROOT = Path(__file__).parents[2]


def die(*_, **__) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def fork(call: Callable) -> tuple[int, int]:
    """A copy of this process that makes the call: its id, and the end of a pipe that gets the value as JSON."""
    read, write = os.pipe()
    if child := os.fork():
        os.close(write)
        return child, read
    try:
        os.write(write, json.dumps({"value": call()}).encode())
    except BaseException:
        os.write(write, json.dumps({"error": traceback.format_exc()[-20_000:]}).encode())
    finally:
        os._exit(0)


def end(child: int, read: int) -> tuple[int, dict]:
    """(signal that ended the copy or 0, what it sent)."""
    with open(read, "rb") as pipe:
        sent = pipe.read()
    return os.WTERMSIG(os.waitpid(child, 0)[1]), json.loads(sent or "{}")


def in_child(call: Callable):
    """The value of a call made by a copy of this process."""
    signalled, sent = end(*fork(call))
    assert not signalled and "value" in sent, (signalled, sent.get("error"))
    return sent["value"]


def killed(call: Callable) -> None:
    """A copy of this process makes the call, and must die of SIGKILL in it."""
    signalled, sent = end(*fork(call))
    assert signalled == signal.SIGKILL, sent


def run(command: list[str], **variables: str) -> subprocess.CompletedProcess:
    """A new interpreter, which imports all anew; its status must be 0."""
    paths = os.pathsep.join([str(ROOT), str(ROOT / "kernels"), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", **variables}
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return done


def program(main: Callable[[], object]) -> tuple[int, str]:
    """Exit status and output of ``main``, called in a copy of this process."""
    with tempfile.TemporaryFile("w+", errors="replace") as output:

        def run() -> int:
            _stand_in(output.fileno(), output.fileno())
            return _status(main)

        status = in_child(run)
        output.seek(0)
        return status, output.read()


def _stand_in(*numbers: int) -> None:
    """Files for standard output and standard error."""
    for number, standard in zip(numbers, (1, 2), strict=True):
        os.dup2(number, standard)
    sys.stdout, sys.stderr = (os.fdopen(standard, "w", closefd=False) for standard in (1, 2))


def _status(main: Callable[[], object]) -> int:
    try:
        return main() or 0
    except SystemExit as error:
        return error.code or 0
    finally:
        sys.stdout.flush()
        sys.stderr.flush()


@contextlib.contextmanager
def command(main: Callable[[list[str]], int]) -> Iterator[str]:
    """Words for a shell: a program that calls ``main`` with its arguments, in a copy of this process."""
    with tempfile.TemporaryDirectory() as directory, socket.socket(socket.AF_UNIX) as listener:
        listener.bind(place := f"{directory}/socket")
        listener.listen()
        server, pipe = fork(lambda: _serve(listener, main))
        try:
            yield shlex.join([sys.executable, "-IS", __file__, place])
        finally:
            os.kill(server, signal.SIGKILL)
            os.waitpid(server, 0)
            os.close(pipe)


def _serve(listener: socket.socket, main: Callable[[list[str]], int]) -> None:
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # it ends with the process of which it is a copy
    while True:
        connection, _ = listener.accept()
        with connection:
            sent, files, _, _ = socket.recv_fds(connection, 1 << 20, 2)
            if os.fork() == 0:
                _answer(connection, main, json.loads(sent), files)
        for file in files:
            os.close(file)
        with contextlib.suppress(ChildProcessError):
            while os.waitpid(-1, os.WNOHANG) != (0, 0):
                pass


def _answer(connection: socket.socket, main: Callable[[list[str]], int], request: list, files: list[int]) -> None:
    words, cwd, environment = request
    try:
        _stand_in(*files)
        os.chdir(cwd)
        os.environ.clear()
        os.environ.update(environment)
        connection.send(bytes([_status(lambda: main(words))]))
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(0)


def _ask(place: str, words: list[str]) -> int:
    """The other side: the status of the call, 1 where the process that makes it ends before it."""
    with socket.socket(socket.AF_UNIX) as connection:
        connection.connect(place)
        request = json.dumps([words, os.getcwd(), dict(os.environ)]).encode()
        socket.send_fds(connection, [request], [1, 2])
        return int.from_bytes(connection.recv(1) or b"\1", "big")


def torchrun(work: Callable[[], object], processes: int = 2) -> None:
    """What torchrun does, with forks for interpreters; to be called in a copy of this process.

    Raises ChildFailedError where one of them fails or is killed; the others are ended then.
    """
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    shape = {"min_nodes": 1, "max_nodes": 1, "nproc_per_node": processes, "start_method": "fork"}
    shape |= {"rdzv_backend": "c10d", "rdzv_endpoint": "localhost:0", "run_id": "forks", "max_restarts": 0}
    signal.alarm(1800)  # ends it where processes wait for each other
    elastic_launch(LaunchConfig(**shape, monitor_interval=0.1), _worker)(work)


def _worker(work: Callable[[], object]) -> None:
    """Without what accelerate keeps of the process that was copied."""
    from accelerate.state import AcceleratorState, GradientState

    AcceleratorState._reset_state(True)
    GradientState._reset_state()
    work()


if __name__ == "__main__":
    sys.exit(_ask(sys.argv[1], sys.argv[2:]))
