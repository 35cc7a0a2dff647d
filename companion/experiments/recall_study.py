"""The study behind ``dms recall``: all methods on the same texts, a file of records a method, and what they say.

An interrupted study goes on where it stopped: a text that a method has a record of is not run again.  Texts of about
the same length are run together, retrofits before the controls, whose budget on these texts is what the last retrofit
holds of them.  Controls, which take each token as a step, may be run on the shorter texts alone.
"""

import contextlib
import hashlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from companion.experiments.recall import (
    Document,
    Head,
    control,
    far_tokens,
    group_of,
    live_tokens,
    record,
    scores,
    through,
    whole,
)
from companion.experiments.sample import load_dense
from dms_core.budgets import bootstrap
from dms_core.checkpoint import GATES, fingerprint, is_whole, load_gates, load_model, read_settings
from dms_core.config import DMSConfig
from dms_core.hub_files import local_directory
from dms_core.model import attach
from dms_core.storage import JsonlWriter, claim, read_jsonl

DENSE = "vanilla"
BUDGET = ("live", "peak", "reads")  # at the end of a text, in tokens a KV head
STEP = 512  # tokens: lengths are grouped by the nearest multiple
RANGES = ((0, 256), (256, 512), (512, 1024), (1024, 10**9))  # tokens between a fact and its question


@dataclass(frozen=True)
class Method:
    """A model with a cache; ``file`` holds its records."""

    name: str
    cr: float  # of a retrofit: as trained; of a control: the retrofit's whose memory it gets
    file: Path
    model: object
    head: Head


def open_methods(
    model: str, retrofits: Sequence[Path], controls: Sequence[str], out: Path, device=None
) -> list[Method]:
    """The dense model, its retrofits (directories of gates alone, or of whole models), and the controls."""
    dense = attach(load_dense(model, device)[0], DMSConfig())
    head, methods = Head(dense), []
    for directory in map(local_directory, retrofits):
        cr, mark = float(read_settings(directory)["cr"]), fingerprint(directory)[:8]
        if is_whole(directory):
            theirs = load_model(directory, dtype=dense.dtype).to(dense.device)
        else:
            theirs = load_gates(load_dense(model, device)[0], directory)
        name = "dms-gates" if {file.name for file in directory.glob("*.safetensors")} == {GATES} else "dms"
        methods.append(Method(name, cr, out / f"{name}-cr{cr:g}-{mark}.jsonl", theirs, Head(theirs)))
    others = [Method(name, cr, out / f"{name}-as-cr{cr:g}-{mark}.jsonl", dense, head) for name in controls]
    return [Method(DENSE, 1.0, out / f"{DENSE}.jsonl", dense, head), *methods, *others]


def batches(documents: Sequence[Document], batch: int) -> list[list[int]]:
    """Numbers of documents of about the same length."""
    order = sorted(range(len(documents)), key=lambda i: (len(documents[i].ids), i))
    return [order[i : i + batch] for i in range(0, len(order), batch)]


def measure(
    methods: Sequence[Method],
    documents: Sequence[Document],
    out: Path,
    batch: int,
    facts: dict,
    up_to: int | None = None,
) -> dict:
    """Records {method: {document: record}}, made where they are missing.  ``out`` belongs to one set of texts.

    up_to: controls run on texts of about this many tokens at most, by ``size``.
    """
    digest = hashlib.sha256(repr([(d.ids, d.prompt, d.at.tolist()) for d in documents]).encode()).hexdigest()
    claim(out, {**facts, "texts": digest[:16], "batch": batch}, "recall.json")
    found = {m: {row["document"]: row for row in read_jsonl(m.file)} for m in methods}
    todo = []
    for part in batches(documents, batch):
        fits = up_to is None or max(size(len(documents[i].ids)) for i in part) <= size(up_to)
        these = methods if fits else [m for m in methods if not is_control(m, methods)]
        todo.append((part, [m for m in these if any(i not in found[m] for i in part)]))
    unfinished = dict.fromkeys(m for _, missing in todo for m in missing)
    with contextlib.ExitStack() as stack:
        bar = stack.enter_context(tqdm(total=sum(len(missing) for _, missing in todo), desc="recall", unit="batch"))
        logs = {m: stack.enter_context(JsonlWriter(m.file)) for m in unfinished}  # others may be another process's
        for part, missing in todo:
            if not missing:
                continue
            for m, row in _run(missing, methods, [documents[i] for i in part], part, found):
                if row["document"] not in found[m]:
                    logs[m].write(row)
                    found[m][row["document"]] = row
                if row["document"] == part[-1]:
                    bar.set_postfix_str(m.name, refresh=False)
                    bar.update()
    return found


@torch.inference_mode()
def _run(missing, methods, documents: Sequence[Document], part: Sequence[int], found: dict) -> Iterator[tuple]:
    """(method, record) of each missing method and document, the dense model's first."""
    dense, retrofit = methods[0], last_retrofit(methods)
    with dense.model.dms.disabled():
        truth = whole(dense.model, [d.ids for d in documents])
        if dense in missing:
            far = [far_tokens(dense.model, dense.head, *pair) for pair in zip(truth, documents, strict=True)]
        else:
            known = zip(documents, (found[dense][i]["far_at"] for i in part), strict=True)
            far = [np.isin(np.arange(len(d.at)), at) for d, at in known]
    for m in missing:
        if m is dense:
            hidden, held = truth, [dict.fromkeys(BUDGET, float(len(d.ids))) for d in documents]
        elif not is_control(m, methods):
            hidden = whole(m.model, [d.ids for d in documents])
            held = [dict.fromkeys(BUDGET, live) for live in live_tokens(m.model, [len(d.ids) for d in documents])]
        else:
            live = float(np.mean([found[retrofit][i]["live"] for i in part]))
            hidden, held = _controlled(m, documents, live)
        for i, d, h, t, f, budget in zip(part, documents, hidden, truth, far, held, strict=True):
            row = record(d, scores(h, m.head, t, dense.head, d), f, **budget)
            yield m, {"document": i, **row} | ({"far_at": np.flatnonzero(f).tolist()} if m is dense else {})


def _controlled(m: Method, documents: Sequence[Document], live: float) -> tuple[list, list[dict]]:
    """Hidden states and budgets of a control that gets ``live`` tokens."""
    cache = control(m.name, documents, live)(m.model)
    with m.model.dms.disabled():
        hidden, reads = through(m.model, cache, documents)
    counters = *(x.float().mean((0, 2)) for x in (cache.live_tokens(), cache.peak_tokens())), reads
    return hidden, [dict(zip(BUDGET, row, strict=True)) for row in torch.stack(counters, 1).tolist()]


def size(tokens: int) -> int:
    """Tokens in steps of STEP, at least one."""
    return STEP * max(round(tokens / STEP), 1)


def is_control(method: Method, methods: Sequence[Method]) -> bool:
    """Whether it is the dense model, the first of the methods, with another cache."""
    return method is not methods[0] and method.model is methods[0].model


def last_retrofit(methods: Sequence[Method]) -> Method | None:
    """The one with whose memory the controls are compared."""
    return next((m for m in reversed(methods) if m.name in ("dms", "dms-gates")), None)


# What the records say.


def ratios(row: dict) -> dict[str, tuple[float, float]]:
    """Each measure of one document as (numerator, denominator); (0, 0) where the document has no part in it."""
    talk, counted = bool(row["asked"]), row["counted"]
    found = {"agreement": (row["same"], counted), "kl": (row["kl"], counted)} if talk else {}
    found |= {"far_agreement": (row["far_same"], row["far"]), "far_kl": (row["far_kl"], row["far"])} if talk else {}
    found |= {} if talk else {"prose_kl": (row["kl"], counted), "prose_nats": (-row["logp"], counted)}
    for question in row["asked"]:
        group, held_out = group_of(question["kind"])
        for name in (group, *([f"{group}_held_out"] if held_out else [])):
            right, of = found.get(name, (0, 0))
            found[name] = right + question["right"], of + 1
        nats, of = found.get("answer_nats", (0, 0))
        found["answer_nats"] = nats - question["logp"], of + 1
    return found


def summaries(found: dict[Method, dict[int, dict]], resamples: int = 2000) -> dict:
    """The summary of the methods that ran on all texts.

    ``common``: of all methods on the texts of all, or None where all ran on all.
    """
    texts = set().union(*found.values())
    whole = {m: rows for m, rows in found.items() if set(rows) == texts}
    common = sorted(texts.intersection(*found.values())) if len(whole) < len(found) else []
    of_all = {m: {i: rows[i] for i in common} for m, rows in found.items()}
    return summary(whole, resamples) | {"common": summary(of_all, resamples) if common else None}


def summary(found: dict[Method, dict[int, dict]], resamples: int = 2000) -> dict:
    """Rows a method, differences from the last retrofit, needles by length and distance.  All have the same texts."""
    documents = sorted(next(iter(found.values())))
    draws = bootstrap.indices(len(documents), resamples)
    values = {m: [ratios(rows[i]) for i in documents] for m, rows in found.items()}
    names = sorted({name for rows in values.values() for row in rows for name in row})
    samples = {(m, name): _resampled(rows, name, draws) for m, rows in values.items() for name in names}
    ours = last_retrofit(list(found))
    rows, pairs, cells = [], [], []
    for m, records in found.items():
        total = {key: sum(row[key] for row in records.values()) for key in ("tokens", *BUDGET)}
        held = {f"cr_{key}": total["tokens"] / total[key] for key in BUDGET}
        measures = {name: _interval(samples[m, name]) for name in names}
        rows.append({"method": m.name, "cr": m.cr, **held, "measures": measures})
        cells += [{"method": m.name, "cr": m.cr, **cell} for cell in needle_cells(list(records.values()))]
        for name in names if ours not in (None, m) else ():
            spread = _interval(samples[ours, name] - samples[m, name])
            pairs.append({"a": ours.name, "b": m.name, "cr": m.cr, "measure": name, **spread})
    dense = next(iter(found.values())).values()
    questions = sum(len(row["asked"]) for row in dense)
    facts = {"documents": len(documents), "questions": questions, "counted": sum(row["counted"] for row in dense)}
    return {**facts, "far": sum(row["far"] for row in dense), "rows": rows, "pairs": pairs, "cells": cells}


def _resampled(rows: Sequence[dict], name: str, draws: np.ndarray) -> np.ndarray:
    """The measure as it is, then of each resample of documents: (1 + R,); NaN where none has a part in it."""
    top, bottom = np.array([row.get(name, (0, 0)) for row in rows], float).T
    of = np.concatenate([[bottom.sum()], bottom[draws].sum(1)])
    return np.divide(np.concatenate([[top.sum()], top[draws].sum(1)]), of, out=np.full(len(of), np.nan), where=of > 0)


def _interval(samples: np.ndarray) -> dict:
    low, high = bootstrap.interval(samples[1:])
    return {"value": None if math.isnan(samples[0]) else float(samples[0]), "low": low, "high": high}


def needle_cells(rows: Sequence[dict]) -> list[dict]:
    """Needles recalled by the text's length and by the distance from the fact to its question."""
    cells: dict[tuple, list[bool]] = {}
    for row in rows:
        for question in row["asked"]:
            if group_of(question["kind"])[0] == "needles":
                reach = next(r for r in RANGES if r[0] <= question["distance"] < r[1])
                cells.setdefault((size(row["tokens"]), *reach), []).append(question["right"])
    return [
        {
            "length": length,
            "from": low,
            "to": high,
            "right": sum(right),
            "of": len(right),
            **wilson(sum(right), len(right)),
        }
        for (length, low, high), right in sorted(cells.items())
    ]


def wilson(right: int, of: int, z: float = 1.96) -> dict[str, float]:
    """95 % interval of a share."""
    middle, half = right + z * z / 2, z * math.sqrt(right * (of - right) / of + z * z / 4)
    return {"low": (middle - half) / (of + z * z), "high": (middle + half) / (of + z * z)}
