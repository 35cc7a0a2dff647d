"""Snakemake in copies of a process that has imported it: importing takes longer than most calls."""

import json
import os
import subprocess
import sys
from functools import cache


def snakemake(arguments: list, cwd, environment: dict) -> tuple[int, str]:
    """Exit status and output of ``python -m snakemake ARGUMENTS``."""
    server = _server()
    server.stdin.write(json.dumps([list(map(str, arguments)), str(cwd), environment]) + "\n")
    server.stdin.flush()
    return tuple(json.loads(server.stdout.readline()))


@cache
def _server() -> subprocess.Popen:
    """It ends with this process, whose end closes its input."""
    return subprocess.Popen([sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def _serve() -> None:
    import papermill  # noqa: F401  with Snakemake what each call would import, but for the sources, which may be copies
    from snakemake import cli, workflow  # noqa: F401

    for line in sys.stdin:
        arguments, cwd, environment = json.loads(line)
        read, write = os.pipe()
        if child := os.fork():
            os.close(write)
            with open(read, encoding="utf-8", errors="replace") as pipe:
                output = pipe.read()
            status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
            print(json.dumps([status, output]), flush=True)
        else:
            _child(cli.main, arguments, cwd, environment, write)


def _child(main, arguments: list[str], cwd: str, environment: dict, write: int) -> None:
    with open(os.devnull) as nothing:
        os.dup2(nothing.fileno(), 0)
    os.dup2(write, 1)
    os.dup2(write, 2)
    os.close(write)
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(environment)
    sys.path[:0] = environment["PYTHONPATH"].split(os.pathsep)
    status = 1
    try:
        main(arguments)
    except SystemExit as end:
        status = end.code
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


if __name__ == "__main__":
    _serve()
