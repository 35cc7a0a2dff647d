"""GPU-hours of a configuration before it runs: the paper's Table 3 for the retrofit, the roofline for the chains.

Chains are counted as if each went on to the largest L, which is too many, and decode steps as if arithmetic and reading
overlapped perfectly, which is too fast.  Prefill is left out.
"""


def lines(settings: dict, device: str = "h100") -> list[str]:
    """The estimate as text."""
    if "profile" in settings:
        return [f"profile {settings['profile']}: no GPU; LOG.md has the minutes it took on two CPU cores"]
    from companion.cost.planner import RETROFIT_HOURS, find_architecture, sampling_hours
    from companion.cost.roofline import DEVICES, Architecture

    name = settings["architecture"] or settings["model"]
    arch = Architecture(**name) if isinstance(name, dict) else find_architecture(name)
    rules = settings["resources"] or {}
    gpus = next((g for rule in ("sample", "default") if (g := (rules.get(rule) or {}).get("gpus"))), 1)
    trained = settings["methods"].get("dms")
    shards = settings["shards"]
    jobs = f"{shards} job{'s' * (shards > 1)} of {gpus} GPU{'s' * (gpus > 1)} each"
    text, total = [f"{settings['model']} on {device}, chains in {jobs}"], 0.0
    if str(name) in RETROFIT_HOURS and trained:
        total = RETROFIT_HOURS[name] * (max(trained) - 1)
        text.append(f"{'retrofit to CR ' + format(max(trained), 'g'):32} {total:10.0f} GPU-hours (paper, Table 3)")
    elif trained:
        text.append(f"retrofit to CR {max(trained):g}: this model is not in the paper's Table 3")
    for task, facts in settings["tasks"].items():
        for method, crs in settings["methods"].items():
            for cr in crs:
                read = 1 if method == "snapkv" else cr  # it compresses the prompt alone, Quest reads alone
                held = 1 if method.removesuffix("-protected") == "quest" else read
                length, chains = max(facts["lengths"]), facts["problems"] * facts["chains"]
                hours, batch = sampling_hours(arch, DEVICES[device], gpus, length, chains, read, held, shards)
                total += hours
                what = f"{hours:10.1f} GPU-hours, {batch} at once" if batch else "does not fit: more GPUs"
                text.append(f"{f'{task}, {method}, CR {cr:g}':32} {what}")
    return [*text, f"{'all':32} {total:10.0f} GPU-hours; chains as if all reached L, steps as fast as the roofline"]
