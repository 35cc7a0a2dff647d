"""Snakemake in copies of a process that has imported it: importing takes longer than most calls."""

import json
import os
import subprocess
import sys
from functools import cache, partial

from forks import program


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
        print(json.dumps(program(partial(_call, cli.main, *json.loads(line)))), flush=True)


def _call(main, arguments: list[str], cwd: str, environment: dict) -> None:
    with open(os.devnull) as nothing:
        os.dup2(nothing.fileno(), 0)
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(environment)
    sys.path[:0] = environment["PYTHONPATH"].split(os.pathsep)
    main(arguments)


if __name__ == "__main__":
    _serve()
