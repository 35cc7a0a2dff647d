"""Programs in copies of this process: importing torch, transformers and the packages takes ten seconds, a copy none."""

import json
import os
import signal
import traceback
from collections.abc import Callable


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
        os.write(write, json.dumps({"error": traceback.format_exc()[-4000:]}).encode())
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
