"""Does a model, or a model type of transformers, work with DMS?"""

from companion.cli.app import command, opt

INSPECT = "Inspect"


@command(INSPECT, "check", passed=lambda result: result["refused"] is None and all(result["checks"].values()))
def check(
    model: opt(str, "a directory or a hub id, without gates") = None,
    family: opt(str, "a model type of transformers, such as qwen3_next: a tiny random model of it, offline") = None,
    device: opt(str, "cpu, cuda, cuda:1, ... (default: cuda where there is one)") = None,
    seed: opt(int, "of the gates' weights and of the text") = 0,
):
    """try DMS on a model: gates off, cached against uncached, padding, turns, sampling, gradients, save and load"""
    if (model is None) == (family is None):
        raise ValueError("check: give one of --model and --family")
    import torch

    from companion.devices import checked_device
    from companion.families import tiny_model
    from dms_core.check import check as try_everything
    from dms_core.checkpoint import load_base

    device = checked_device(device)
    loaded = (
        tiny_model(family, seed) if family else load_base(model, dtype=torch.float32)
    )  # bf16 flips decisions near 0
    report = try_everything(loaded.to(device), seed)
    if report.refused:
        yield f"refused: {report.refused}"
    for name, good in report.checks.items():
        yield f"{'pass' if good else 'FAIL'}  {name}" + (f": {report.details[name]}" if not good else "")
    return {"model": model or family, "checks": report.checks, "refused": report.refused}
