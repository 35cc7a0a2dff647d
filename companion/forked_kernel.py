"""Kernels of notebooks as forks of a process that has imported everything: an ordinary one imports for ten seconds.

Calls of run_side_by_side are forked from a process that imports what ``prepare`` names.  Such a call forks itself once
more before it has threads, an event loop or sockets; the copy waits for what jupyter_client would have given to a new
Python, and becomes the kernel.  It is a child of the process that executes the notebook, as an ordinary kernel is, so
signals, exit codes and the end of the parent are seen in the same way.
"""

import atexit
import contextlib
import multiprocessing
import os
import sys
from collections.abc import Iterator
from multiprocessing import forkserver
from multiprocessing.connection import Connection

from jupyter_client.manager import AsyncKernelManager
from jupyter_client.provisioning import LocalProvisioner

LAUNCHER = "ipykernel_launcher"  # the module that a new Python would run


@contextlib.contextmanager
def kernel_manager() -> Iterator[type[AsyncKernelManager]]:
    """The manager class for one notebook: a fork in processes that are forks themselves, elsewhere the ordinary one."""
    if forkserver.get_inherited_fds() is None:
        yield AsyncKernelManager
        return
    copy = Copy()

    class ForkingManager(AsyncKernelManager):
        def __init__(self, **traits) -> None:
            super().__init__(**traits)
            self.provisioner = ForkedKernel(kernel_spec=self.kernel_spec, parent=self)
            self.provisioner.copy = copy

    try:
        yield ForkingManager
    finally:
        copy.kill()


class ForkedKernel(LocalProvisioner):
    """Starts the kernel in a copy of this process; a second start, or one of another kernel, is the ordinary one."""

    copy: "Copy | None" = None

    async def launch_kernel(self, cmd: list[str], **options) -> dict:
        copy, self.copy = self.copy, None
        if copy is None or cmd[0] != sys.executable or LAUNCHER not in cmd:
            return await super().launch_kernel(cmd, **options)
        arguments = cmd[cmd.index(LAUNCHER) + 1 :]
        copy.become_kernel(arguments, options["env"], options.get("cwd") or os.getcwd())
        self.process, self.pid, self.pgid = copy, copy.pid, copy.pid
        return self.connection_info


class Copy:
    """A copy of this process that waits to be a kernel, with what LocalProvisioner uses of a subprocess.Popen."""

    stdin = stdout = stderr = None

    def __init__(self) -> None:
        self._pipe, its_end = multiprocessing.Pipe()
        fork = multiprocessing.get_context("fork")
        self._process = fork.Process(target=_wait_for_notebook, args=(its_end, self._pipe))
        self._process.start()
        its_end.close()

    def become_kernel(self, arguments: list[str], environment: dict[str, str], directory: str) -> None:
        self._pipe.send((arguments, environment, directory))
        self._pipe.close()

    @property
    def pid(self) -> int:
        return self._process.pid

    def poll(self) -> int | None:
        return self._process.exitcode

    def wait(self) -> int:
        self._process.join()
        return self._process.exitcode

    def send_signal(self, number: int) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, number)

    def kill(self) -> None:
        """End it, if it has not ended by itself."""
        self._process.kill()
        self._process.join()


def _wait_for_notebook(pipe: Connection, others_end: Connection) -> None:
    others_end.close()  # so that the end of the parent ends the pipe
    os.setsid()  # as jupyter_client starts a kernel: signals go to the kernel and its children alone
    try:
        arguments, environment, directory = pipe.recv()
    except EOFError:
        return
    pipe.close()
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(directory)
    _run_kernel(arguments, multiprocessing.parent_process().pid)


def _run_kernel(arguments: list[str], parent: int) -> None:
    """What ``python -m ipykernel_launcher`` does, where ipykernel may already be imported."""
    from ipykernel.kernelapp import IPKernelApp

    sys.argv = [LAUNCHER, *arguments]
    kernel = IPKernelApp.instance(parent_handle=parent)  # whose end ends the kernel
    kernel.initialize(arguments)
    _decide_again()
    kernel.start()
    atexit._run_exitfuncs()  # as other processes end; multiprocessing leaves it out before Python 3.14


def _decide_again() -> None:
    """What these packages decide when a kernel, or what is none, imports them."""
    if matplotlib := sys.modules.get("matplotlib"):
        matplotlib.rcParams["backend"] = os.environ["MPLBACKEND"]  # which ``initialize`` has set
    if pandas := sys.modules.get("pandas"):
        pandas.set_option("display.max_columns", 20)
