"""What runs inside the sandbox: a script of its own, handed to ``python -I -c`` with its settings as JSON.

``program`` runs one program on one input; ``serve`` answers grading requests, one JSON line each, until its input
ends.  Neither is ever told an expected output of a program.
"""

import contextlib
import functools
import importlib
import json
import os
import resource
import sys

MODULES = (
    "string, re, datetime, collections, heapq, bisect, copy, math, random, statistics, itertools, functools, operator"
)
MODULES += ", io, sys, json"


def confine(settings: dict) -> None:
    """Give up root and lower the limits, for good: hard limits, and no capability that could raise them."""
    limits = {"cpu": "RLIMIT_CPU", "memory": "RLIMIT_AS", "output": "RLIMIT_FSIZE", "processes": "RLIMIT_NPROC"}
    for name, limit in limits.items():
        value = settings.get(name)
        if value is not None and hasattr(resource, limit):
            resource.setrlimit(getattr(resource, limit), (value, value))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    if settings.get("uid") is not None:
        os.setgroups([])
        os.setgid(settings["uid"])
        os.setuid(settings["uid"])


def names() -> dict:
    """What LiveCodeBench's runner imports for every program: the protocol's, since starter code relies on it."""
    space = {"__name__": "__main__", "__builtins__": __builtins__}
    exec("".join(f"from {name} import *\n" for name in f"{MODULES}, builtins, typing".split(", ")), space)
    exec(f"import {MODULES}", space)
    return space


def run_program(settings: dict) -> None:
    os.write(1, b"\0")  # it has started: what goes wrong from here on is the program's doing
    with open(settings["program"], encoding="utf-8") as file:
        source = file.read()
    sys.setrecursionlimit(50000)
    sys.set_int_max_str_digits(50000)  # the protocol's; Python's own is 4300
    space = names()
    code = compile(source, "program.py", "exec")
    call = settings["call"]
    if call is None:
        with contextlib.suppress(SystemExit):  # as the protocol's runner: what was printed counts
            exec(code, space)
        return
    answers = os.fdopen(os.dup(1), "w")
    sys.stdout = sys.stderr  # what a function prints is not its answer
    arguments = [json.loads(line) for line in sys.stdin.read().split("\n")]
    space["__name__"] = "program"
    exec(code, space)
    function = getattr(space["Solution"](), call) if "class Solution" in source else space[call]
    answers.write(json.dumps(function(*arguments)))
    answers.flush()


def grade_math(request: dict) -> bool:
    from math_answers import equal

    return equal(request["gold"], request["answer"])  # no time limits: the caller keeps them


@functools.cache
def gym_dataset(name: str, options: str):
    import reasoning_gym

    return reasoning_gym.create_dataset(name, **json.loads(options))


def grade_gym(request: dict) -> float:
    data = gym_dataset(request["dataset"], json.dumps(request["options"]))
    return float(data.score_answer(request["answer"], data[request["index"]]))


def grade_check(request: dict) -> bool:
    """Run a checker, a program that reads ``answer`` and sets ``holds``."""
    space = {"answer": request["answer"]}
    exec(compile(request["program"], "checker.py", "exec"), space)
    return bool(space["holds"])


GRADERS = {"math": (grade_math, "math_answers"), "gym": (grade_gym, "reasoning_gym"), "check": (grade_check, "json")}


def serve(settings: dict) -> None:
    """Answer requests with {"value"} or {"error"}."""
    grade, module = GRADERS[settings["grader"]]
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # a library's own prints go to standard error
    sys.path += settings["path"]
    importlib.import_module(module)
    print(json.dumps({"ready": True}), file=answers, flush=True)
    for line in sys.stdin:
        try:
            answer = {"value": grade(json.loads(line))}
        except Exception as error:  # a grader that fails on an answer does not accept it
            answer = {"error": f"{type(error).__name__}: {error}"}
        print(json.dumps(answer), file=answers, flush=True)


given = json.loads(sys.argv[1])
confine(given)
{"program": run_program, "serve": serve, "nothing": lambda _: print("confined")}[given["mode"]](given)
