"""What decoding costs, how fast the operations are here, and how close a compressed cache stays to the dense model."""

import json
import os
import re
import sys
from pathlib import Path

from companion.cli.app import Device, arg, at_least_one, command, opt
from companion.paths import RESULTS
from dms_core.storage import read_json, read_jsonl, write_json, write_text

MEASURE, INSPECT = "Measure", "Inspect"
Dense = opt(str, "the dense model: a directory or a hub id")
Conversations = opt(Path, "held-out conversations from dms converse", metavar="FILE")


@command(MEASURE, "plan")
def plan(
    model: opt(str, "a known name such as llama-3.1-8b or gpt-oss-20b, a directory or a hub id"),
    batch: opt(int, "sequences decoded together") = 1,
    context: opt(int, "tokens of each") = 8192,
    cr: opt(float, "compression ratio of the cache") = 1.0,
    device: opt(str, "a100, h100 or h200") = "h100",
):
    """what decoding a model costs, by the roofline model of the paper's appendix I"""
    from companion.cost import planner

    result = planner.plan(model, batch, context, cr, device)
    yield from planner.lines(result)
    return result


@command(MEASURE, "bench")
def bench(
    kind: arg(str, "prefill, train, decode, cache, sampling or e2e", "KIND"),
    device: Device = None,
    case: opt(list[str], "only this case; may be given repeatedly", metavar="NAME") = None,
    repeats: opt(int, "timed rounds (default: what some seconds allow)") = None,
    quick: opt(bool, "tiny shapes, to see that it runs", "--quick") = False,
    save: opt(str, "merge into data/results/kernels-DEVICE.json, or into FILE", metavar="[FILE]") = None,
):
    """time an operation of dms_kernels, sampling or a whole model's decoding against what one would use otherwise"""
    from companion.devices import checked_device
    from companion.experiments import end_to_end, sampling_speed
    from companion.provenance import describe
    from dms_kernels import benchmarks

    device = checked_device(device)
    if quick and save == "":
        raise ValueError("--quick with --save: tiny shapes are not kept among the results; name a file after --save")
    whole = {"sampling": sampling_speed.measure, "e2e": end_to_end.measure}.get(kind)
    cases = whole(device, case, repeats, quick) if whole else benchmarks.run(kind, device, case, repeats, quick)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    facts = {**describe(), "cores": cores}
    name = facts["device"] if device == "cuda" else "cpu"
    result = {"device": name, "environment": facts, "cases": cases}
    if save is not None:
        file = Path(save) if save else RESULTS / f"kernels-{slug(name)}.json"
        save_cases(result, file)
        print(f"saved {file}", file=sys.stderr)
    yield from bench_lines(cases)
    return result


def slug(name: str) -> str:
    """A device's name as a part of a file name."""
    return re.sub("[^a-z0-9]+", "-", name.lower()).strip("-")


def save_cases(result: dict, file: Path) -> None:
    """Put the cases into ``file`` in place of those of the same name; cases of another environment are dropped."""
    old = read_json(file) if file.exists() else {"environment": None, "cases": []}
    if old["environment"] == result["environment"]:
        cases = {case["name"]: case for case in [*old["cases"], *result["cases"]]}
        result = {**result, "cases": sorted(cases.values(), key=lambda case: (case["kind"], case["name"]))}
    elif old["cases"]:
        print(f"{file}: {len(old['cases'])} cases of another environment are dropped", file=sys.stderr)
    write_json(file, result)


def bench_lines(cases: list[dict]):
    """One line a case."""
    wide = max((len(case["name"]) for case in cases), default=0)
    for case in cases:
        others = sorted(case["baseline_ms"].items())
        yield "   ".join(
            [
                f"{case['name']:{wide}}  ours {case['ours_ms']:9.2f} ms",
                *(f"{name} {ms:9.2f} ms {case['ratio'][name]:7.2f}x" for name, ms in others),
                f"{case['gbps']:6.2f} GB/s (a copy {case['copy_gbps']:.1f})",
                "peak MB: " + ", ".join(f"{name} {size / 1e6:.1f}" for name, size in case["peak_bytes"].items()),
                *(f"{name}: {note}" for name, note in case["notes"].items()),
            ]
        )


@command(INSPECT, "kernels", passed=lambda result: all(case["ok"] for case in result.get("cases", [])))
def kernels(
    aot: opt(bool, "compile every Triton kernel; needs no card, takes minutes", "--aot") = False,
    target: opt(list[int], "of --aot: 80, 86, 90, 100 (default: all)", metavar="SM...") = (),
):
    """which implementation serves which device; what the kernels compile to"""
    if target and not aot:
        raise ValueError(f"--target {' '.join(map(str, target))}: must be with --aot")
    if aot:
        from importlib import metadata

        from dms_kernels import aot as compiler

        try:
            cases = compiler.report(tuple(target) or tuple(compiler.SHARED_LIMIT))
        except ImportError as error:
            raise ValueError(str(error)) from error
        yield from map(aot_line, cases)
        return {"triton": metadata.version("triton"), "cases": cases}
    result = implementations()
    for device, entry in result["devices"].items():
        served = entry["modules"] or {"none": entry["why"]}
        yield "  ".join([f"{device:5}", *(f"{operation}: {module}" for operation, module in served.items())])
    return result


def aot_line(case: dict) -> str:
    head = f"{case['kernel']:44} sm_{case['target']:<4}"
    if "error" in case:
        return f"{head} {case['error'].splitlines()[0]}"
    needs = f"{case['registers']:4} registers {case['spills']:4} spills {case['shared']:7} of {case['limit']} B shared"
    return f"{head} {needs}{'' if case['ok'] else '  NOT OK'}"


def implementations() -> dict:
    """Which modules serve which device on this machine."""
    import importlib.util

    import torch

    from companion.provenance import describe
    from dms_kernels import MODULES

    facts = describe()
    why = None if torch.cuda.is_available() else "torch finds no CUDA card"
    if why is None and importlib.util.find_spec("triton") is None:
        why = "triton is not installed"
    devices = {}
    for number, (device, name, lack) in enumerate([("cpu", facts["processor"], None), ("cuda", facts["device"], why)]):
        modules = {operation: f"dms_kernels.{names[number]}" for operation, names in MODULES.items()}
        devices[device] = {"name": name, "modules": None if lack else modules, "why": lack}
    return {"torch": facts["packages"]["torch"], "triton": facts["packages"].get("triton"), "devices": devices}


@command(MEASURE, "fidelity")
def fidelity(
    model: Dense,
    gates: opt(list[Path], "checkpoints of its retrofit", metavar="DIR..."),
    data: Conversations,
    tokens: opt(int, "of the dense continuation that are compared") = 96,
    longest: opt(int, "tokens of a prompt at most") = 2000,
    device: Device = None,
    save: opt(str, "default: data/results/smollm2.json", metavar="[FILE]") = None,
):
    """a compressed cache beside the dense model: agreement, KL, memory, speed"""
    from companion.experiments.fidelity import report
    from companion.experiments.sample import load_dense
    from companion.provenance import describe

    conversations = [row["messages"] for row in read_jsonl(data)]
    result = report(*load_dense(model, device), gates, conversations, tokens, longest) | {"environment": describe()}
    if save is not None:
        write_json(save or RESULTS / "smollm2.json", result)
    line = (
        "{method} CR {cr:g}: agreement {agreement:.3f} [{agreement_low:.3f}, {agreement_high:.3f}], KL {kl:.4f}, "
        "CR {cr_decisions:.2f} (live {cr_live:.2f}), needles {needles:.2f}, {tokens_per_s:.1f} tokens/s"
    )
    yield from (line.format(**row) for row in result["rows"])
    yield "transformers' own cache: {tokens_per_s:.1f} tokens/s".format(**result["plain"])
    return result


@command(INSPECT, "tokens")
def tokens(
    model: Dense,
    gates: opt(Path, "a checkpoint of its retrofit", metavar="DIR"),
    data: Conversations,
    index: opt(int, "the conversation that is shown") = 0,
    limit: opt(int, "tokens of it that are shown") = 400,
    documents: opt(int, "conversations, whole, that are summarised") = 4,
    device: Device = None,
    save: opt(str, "default: data/results/smollm2-tokens.json", metavar="[FILE]") = None,
):
    """which tokens of held-out conversations stay in the cache, and of what kind"""
    conversations = [row["messages"] for row in read_jsonl(data)]
    if not 0 <= index < len(conversations):
        raise ValueError(f"--index {index}: {data} has conversations 0 to {len(conversations) - 1}")
    at_least_one(limit=limit, documents=documents)
    from tqdm import tqdm

    from companion.experiments.sample import load_dense
    from companion.figures.tokens import example, summary
    from companion.provenance import describe
    from dms_core.checkpoint import load_gates, read_settings

    dense, tokenizer = load_dense(model, device)
    dense = load_gates(dense, gates)
    several = tqdm(conversations[:documents], desc="conversations")
    result = {
        "cr": read_settings(gates)["cr"],
        "index": index,
        "example": example(dense, tokenizer, conversations[index], limit),
        "summary": summary([example(dense, tokenizer, messages, sys.maxsize) for messages in several]),
        "environment": describe(),
    }
    if save is not None:
        write_text(save or RESULTS / "smollm2-tokens.json", json.dumps(result) + "\n")
    yield "{documents} documents, {tokens} tokens; of each kind, the share that is kept:".format(**result["summary"])
    for kind, facts in result["summary"]["kinds"].items():
        yield f"{kind:12} {facts['tokens']:6} tokens {100 * facts['retention']:5.1f} %"
    return result
