"""Studies of the embedded model's retrofit: short ablations, and what the delay is used for."""

from pathlib import Path

from companion.cli.app import Device, arg, command, opt
from companion.paths import RESULTS, RUNS
from dms_core.storage import update_json, write_json

ABLATED = (
    "{variant}: KL {kl:.4f}, agreement {agreement:.4f}, CR {cr_decisions:.2f} by decisions, {cr_live:.2f} live, "
    "accuracy {accuracy:.1f} [{low:.1f}, {high:.1f}]"
)
FOLLOWED = (
    "{model}, {patched}: follows the other digit {follows:.1f} % [{follows_low:.1f}, {follows_high:.1f}], "
    "log-odds moved {effect:.3f} [{effect_low:.3f}, {effect_high:.3f}]"
)


@command("Reproduce", "ablate")
def ablate(
    name: arg(str, "window, steps, loss or weights; delay: an intervention", "NAME"),
    runs: opt(Path, "where retrofits are kept", metavar="DIR") = RUNS / "ablations",
    finished: opt(bool, "only what was measured before; train nothing", "--finished") = False,
    documents: opt(int, "of delay: validation documents") = 200,
    save: opt(bool, "also store the result in data/results", "--save") = False,
    device: Device = None,
):
    """what a part of the method is worth: retrofits that differ in one thing"""
    if finished and name == "delay":
        raise ValueError(f"--finished with {name}: must be an ablation by short retrofits")
    from transformers.utils import logging

    logging.disable_progress_bar()
    if name == "delay":
        from companion.experiments.delay import delay

        result = delay(documents=documents, device=device)
        yield from (FOLLOWED.format(**row) for row in result["rows"] if row["kind"] == "all")
        yield result["verdict"]
    else:
        from companion.experiments.ablations import ablation, open_ablations

        result = ablation(name, open_ablations(runs, device=device), finished)
        yield from (ABLATED.format(**row) for row in result["rows"])
        line = "accuracy {a} - {b}: {difference:+.1f} [{low:+.1f}, {high:+.1f}]"
        yield from (line.format(**row) for row in result["pairs"])
        yield from (f"{variant}: not finished" for variant in result["missing"])
    if save and name == "delay":
        write_json(RESULTS / "delay.json", result)
    elif save:
        update_json(RESULTS / "ablations.json", **{name: result})
    return result
