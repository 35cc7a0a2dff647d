"""Studies of the embedded model's retrofit: short ablations, and what the delay is used for."""

import sys
from functools import partial
from pathlib import Path

from companion.cli.app import Device, arg, at_least_one, command, opt
from companion.paths import RESULTS, RUNS
from dms_core.storage import update_json, write_json

ABLATED = (
    "{variant}: KL {kl:.4f}, agreement {agreement:.4f}, CR {cr_decisions:.2f} by decisions, {cr_live:.2f} live, "
    "accuracy {accuracy:.1f} [{low:.1f}, {high:.1f}]"
)
RIGHT = (
    "{task}, {model}: right {clean:.1f} %, source evicted everywhere {forced:.1f} (with another digit there "
    "{exchanged:.1f}), another digit evicted {other:.1f}"
)
HELD = "{words}, {task}: {value:+.1f} [{value_low:+.1f}, {value_high:+.1f}]"
MISSING = "{path}: no checkpoint; `dms stage retrofit-dms-immediate --profile full` makes it, or -seed1 ... of others"


@command("Reproduce", "ablate")
def ablate(
    name: arg(str, "window, steps, loss, weights, neuron or teachers; delay: an intervention", "NAME"),
    runs: opt(Path, "of retrofits (default: runs/ablations; of delay: runs, for profile full)", metavar="DIR") = None,
    seeds: opt(int, "retrofits of each kind") = 1,
    finished: opt(bool, "only what was measured before; train nothing", "--finished") = False,
    documents: opt(int, "of delay: validation documents a task (default: 200)") = None,
    delayed: opt(list[Path], "of delay: checkpoints, one a seed, in place of the usual ones", metavar="DIR...") = (),
    immediate: opt(list[Path], "of delay: the same, with immediate eviction", metavar="DIR...") = (),
    save: opt(bool, "also store the result in data/results", "--save") = False,
    device: Device = None,
):
    """what a part of the method is worth: retrofits that differ in one thing"""
    if finished and name == "delay":
        raise ValueError(f"--finished with {name}: must be an ablation by short retrofits")
    if name != "delay" and (documents is not None or delayed or immediate):
        raise ValueError(f"--documents, --delayed or --immediate with {name}: must be with delay")
    from transformers.utils import logging

    logging.disable_progress_bar()
    if name == "delay":
        given = {"dms": delayed, "dms-immediate": immediate}
        result = yield from _delay(runs or RUNS, seeds, given, 200 if documents is None else documents, device)
    else:
        from companion.experiments.ablations import ablation, open_ablations

        at_least_one(seeds=seeds)
        run = open_ablations(runs or RUNS / "ablations", device=device, seeds=seeds)
        result = ablation(name, run, finished, partial(print, file=sys.stderr, flush=True))
        yield from (ABLATED.format(**row) for row in result["rows"])
        line = "accuracy {a} - {b}: {difference:+.1f} [{low:+.1f}, {high:+.1f}]"
        yield from (line.format(**row) for row in result["pairs"])
        yield from (f"{variant}: not finished" for variant in result["missing"])
    if save and name == "delay":
        write_json(RESULTS / "delay.json", result)
    elif save:
        update_json(RESULTS / "ablations.json", **{name: result})
    return result


def _delay(runs: Path, seeds: int, given: dict[str, list[Path]], documents: int, device: str | None):
    """Lines to print; returns the result."""
    from companion.experiments.delay import RULE, default_checkpoints, delay, select

    at_least_one(seeds=seeds, documents=documents)
    report = partial(print, file=sys.stderr, flush=True)
    checkpoints = default_checkpoints(runs, seeds) | {name: paths for name, paths in given.items() if paths}
    result = delay(checkpoints, documents=documents, device=device, report=report)
    rows = {(row["task"], row["model"], row["run"]): row["right"] for row in result["rows"] if row["kind"] == "all"}
    for task, model in dict.fromkeys(key[:2] for key in rows):
        runs_of = {"clean": "clean", "forced": "forced", "exchanged": "forced, exchanged", "other": "forced, other"}
        yield RIGHT.format(task=task, model=model, **{name: rows[task, model, run] for name, run in runs_of.items()})
    for words, (*which, _) in RULE.items():
        yield from (HELD.format(words=words, **row) for row in select(result["outcomes"], *which))
    yield from (MISSING.format(path=path) for path in result["missing"])
    yield result["verdict"]
    return result
