"""Does the content of an evicted token move into later tokens during the window?  (Paper section 3.2 supposes it.)

Interchange interventions on look-ups: a digit at position j decides what is predicted at a query q, q - j > w.  The
corrupted run has another digit at j and the same tokens elsewhere.  What the tokens of a set S wrote, in all layers, is
put from the corrupted run into the clean one: keys and values (outputs of k_proj and v_proj) and the gate's logit.

    follows(S) = P(most likely token at q is the other digit)
    effect(S)  = (o(S) - o(clean)) / (o(corrupted) - o(clean)),   o: log-odds at q, other digit over right

S = {j}: the total effect, since later tokens read the exchanged source and write what follows from it.
S = {j + 1, ..., j + w}, with the clean source: what moved into the window while j was still visible.  The next w tokens
are the control; "after source" is all that later tokens carry, and what it lacks of the total goes straight from j.
"""

import contextlib
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from companion.experiments.sample import checked_device
from companion.paths import REASONER
from companion.provenance import describe
from companion.tasks.programs import DIGITS, Problem, make_problem
from companion.tasks.reasoner import load_tokenizer
from dms_core.budgets import bootstrap
from dms_core.checkpoint import load_base, load_model

KINDS = ("definition", "result")
CONDITIONS = ("none", "source", "window", "control", "source and window", "after source", "all")


@dataclass(frozen=True)
class Case:
    """One look-up: token ids up to and including the query, and what is exchanged."""

    ids: tuple[int, ...]
    source: int  # j
    right: int  # the digit's id, which is to be predicted at the query
    wrong: int  # the other digit's id
    kind: str  # "definition": a digit of the prompt; "result": a value found in the trace and needed on a return

    @property
    def query(self) -> int:
        return len(self.ids) - 1


def lookups(problem: Problem, distance: int) -> list[tuple[int, int, str]]:
    """(source, query, kind) of every look-up at least ``distance`` tokens long; one token is one character.

    A first visit ``X=a+4>a;`` repeats the prompt's definition.  A return ``X=3+b=...`` repeats X's last line, whose 3
    is a value found before.
    """
    definitions, at = {}, 0
    for line in problem.prompt.split(";"):
        definitions[line[0]] = line, at
        at += len(line) + 1
    last, found, at = {}, [], len(problem.prompt)
    for line in problem.trace.split(";")[:-1]:
        first_visit = line[0] not in last
        before, start = definitions[line[0]] if first_visit else last[line[0]]
        for k in range(2, min(5, len(before), len(line))):  # X = a + b
            repeated = line[k] in DIGITS and before[k] == line[k]
            of_prompt = definitions[line[0]][0][k : k + 1] in tuple(DIGITS)
            if repeated and of_prompt == first_visit and at + k - 1 - (start + k) >= distance:
                found.append((start + k, at + k - 1, KINDS[not first_visit]))
        last[line[0]] = line, at
        at += len(line) + 1
    return found


def find_cases(tokenizer, documents: int, distance: int, seed: int = 0) -> list[Case]:
    """At most one look-up of each kind a validation document, drawn at random."""
    cases = []
    for index in range(documents):
        problem, rng = make_problem("validation", seed, index), random.Random(f"lookup/{seed}/{index}")
        text, found = problem.prompt + problem.trace, lookups(problem, distance)
        for kind in KINDS:
            if chosen := [place for place in found if place[2] == kind]:
                source, query, _ = rng.choice(chosen)
                wrong = rng.choice([digit for digit in DIGITS if digit != text[source]])
                ids = tokenizer(text[: query + 1])["input_ids"]
                cases.append(Case(tuple(ids), source, *tokenizer.convert_tokens_to_ids([text[source], wrong]), kind))
    return cases


def tokens_of(case: Case, condition: str, window: int) -> range:
    """The positions that a condition patches.  Raises ValueError for an unknown condition."""
    if condition not in CONDITIONS:
        raise ValueError(f"condition {condition!r}: must be one of {', '.join(CONDITIONS)}")
    j, q, after = case.source, case.query, case.source + 1 + window
    spans = (0, 0), (j, j + 1), (j + 1, after), (after, after + window), (j, after), (j + 1, q), (0, q + 1)
    return range(*spans[CONDITIONS.index(condition)])


@contextlib.contextmanager
def _writing(model, act) -> Iterator[None]:
    """Inside, ``act(place, output)`` may replace what tokens write: keys, values (B, T, H D), gate logits (B, H, T)."""
    with contextlib.ExitStack() as hooks:
        for layer, block in enumerate(model.get_decoder().layers):
            for name in ("k_proj", "v_proj", "dms_gate"):
                if (module := getattr(block.self_attn, name, None)) is not None:
                    hook = module.register_forward_hook(lambda m, i, x, place=(layer, name): act(place, x))
                    hooks.enter_context(hook)  # leaving it removes the hook
        yield


@torch.inference_mode()
def recorded(model, ids: Tensor) -> tuple[Tensor, dict]:
    """Logits (B, T, V) of ids (B, T), and what every token wrote, by (layer, module)."""
    written = {}
    with _writing(model, lambda place, output: written.update({place: output.clone()})):
        return model(input_ids=ids, use_cache=False).logits, written


@torch.inference_mode()
def patched(model, ids: Tensor, tokens: Tensor, written: dict) -> Tensor:
    """Logits (B, T, V) of ids (B, T) where the tokens marked in ``tokens`` (B, T) write what stands in ``written``."""

    def put(place: tuple, output: Tensor) -> Tensor:
        chosen = tokens[:, None, :] if place[1] == "dms_gate" else tokens[:, :, None]
        return torch.where(chosen, written[place], output)

    with _writing(model, put):
        return model(input_ids=ids, use_cache=False).logits


def make_batch(cases: Sequence[Case]) -> tuple[Tensor, Tensor]:
    """Clean and corrupted token ids (B, T); padding is on the right, where no query sees it."""
    clean = pad_sequence([torch.tensor(case.ids) for case in cases], batch_first=True)
    corrupted = clean.clone()
    corrupted[range(len(cases)), [case.source for case in cases]] = torch.tensor([case.wrong for case in cases])
    return clean, corrupted


def interchange(model, cases: Sequence[Case], window: int) -> list[dict]:
    """Per case {condition: (predicted id, log-odds of the other digit over the right one)}.

    Also "clean" and "corrupted", the runs without patches, and with gates "kept" (layers, KV heads): whether the clean
    run keeps the source by its decisions.
    """
    clean, corrupted = (ids.to(model.device) for ids in make_batch(cases))
    rows, queries, results = range(len(cases)), [case.query for case in cases], [{} for _ in cases]
    right, wrong = ([getattr(case, name) for case in cases] for name in ("right", "wrong"))

    def note(name: str, logits: Tensor) -> None:
        at = logits[rows, queries]
        odds = at[rows, wrong] - at[rows, right]
        for result, token, value in zip(results, at.argmax(-1).tolist(), odds.tolist(), strict=True):
            result[name] = (token, value)

    note("clean", recorded(model, clean)[0])
    if hasattr(model, "dms"):
        stays = ~torch.stack([e.bool() for e in model.dms.step.evicted.values()])  # (L, B, H, T)
        for row, (result, case) in enumerate(zip(results, cases, strict=True)):
            result["kept"] = stays[:, row, :, case.source].tolist()
    logits, written = recorded(model, corrupted)
    note("corrupted", logits)
    for condition in CONDITIONS:
        tokens = torch.zeros_like(clean, dtype=torch.bool)
        for row, case in enumerate(cases):
            tokens[row, tokens_of(case, condition, window)] = True
        note(condition, patched(model, clean, tokens, written))
    return results


def delay(
    checkpoint: Path | str = REASONER / "dms-cr4",
    base: Path | str = REASONER,
    documents=200,
    seed=0,
    batch=32,
    device: str | None = None,
) -> dict:
    """The experiment on a retrofitted model and the dense one, over the look-ups that both solve in both runs.

    Rates and effects are percentages with 95 % bootstrap intervals over look-ups.
    """
    place = checked_device(device)
    models = {"dms": load_model(checkpoint).to(place), "dense": load_base(base).to(place)}
    window = models["dms"].dms.config.window
    cases = find_cases(load_tokenizer(base), documents, 2 * window + 1, seed)
    order = sorted(range(len(cases)), key=lambda i: len(cases[i].ids))
    found = {name: {} for name in models}
    for name, model in models.items():
        for start in range(0, len(order), batch):
            chosen = order[start : start + batch]
            found[name] |= zip(chosen, interchange(model, [cases[i] for i in chosen], window), strict=True)

    def solved_by(results: dict, i: int) -> bool:
        return (results[i]["clean"][0], results[i]["corrupted"][0]) == (cases[i].right, cases[i].wrong)

    solved = [i for i in range(len(cases)) if all(solved_by(results, i) for results in found.values())]
    cases = [cases[i] for i in solved]
    found = {name: [results[i] for i in solved] for name, results in found.items()}
    settings = {"checkpoint": Path(checkpoint).name, "window": window, "documents": documents, "seed": seed}
    settings |= {"lookups": len(order), "used": len(cases), "least_distance": 2 * window + 1}
    settings["median_distance"] = float(np.median([case.query - case.source for case in cases]))
    return findings(cases, found) | {"settings": settings, "environment": describe()}


def _effects(results: list[dict], condition: str) -> np.ndarray:
    odds = np.array([[r[name][1] for name in (condition, "clean", "corrupted")] for r in results])
    return (odds[:, 0] - odds[:, 1]) / (odds[:, 2] - odds[:, 1])


def findings(cases: Sequence[Case], found: dict[str, list[dict]]) -> dict:
    """Tables of rates and effects by model, condition and kind, differences between the models, and the conclusion."""
    rows, differences = [], []
    for kind in ("all", *KINDS):
        places = [i for i, case in enumerate(cases) if kind in ("all", case.kind)]
        if not places:
            continue
        chosen = {name: [results[i] for i in places] for name, results in found.items()}
        for condition in CONDITIONS:
            for name, results in chosen.items():
                follows = [r[condition][0] == cases[i].wrong for r, i in zip(results, places, strict=True)]
                row = {"model": name, "patched": condition, "kind": kind, "lookups": len(places)}
                rows.append(row | _named("follows", follows) | _named("effect", _effects(results, condition)))
            apart = _effects(chosen["dms"], condition) - _effects(chosen["dense"], condition)
            differences.append({"patched": condition, "kind": kind, **_named("difference", apart)})
    window, control = (_effects(found["dms"], condition) for condition in ("window", "control"))
    specific = _named("difference", window - control)
    kept = np.array([result["kept"] for result in found["dms"]])  # (N, layers, KV heads)
    return {
        "question": "Does the content of an evicted token move into later tokens during the window?",
        "rows": rows,
        "dms_minus_dense": differences,
        "window_minus_control": specific,
        "source_kept": kept.mean(0).tolist(),
        "kept_somewhere": float(100 * kept.any((1, 2)).mean()),
        "verdict": conclusion(specific, next(d for d in differences if d["patched"] == "window")),
    }


def _named(name: str, values) -> dict:
    return dict(zip((name, f"{name}_low", f"{name}_high"), bootstrap.mean(values), strict=True))


def conclusion(specific: dict, against_dense: dict) -> str:
    """Content moved if the window carries more than the control span, and more than in the dense model."""
    more = [d["difference_low"] > 0 for d in (specific, against_dense)]
    numbers = "effect of the window {difference:+.2f} % of the log-odds [{difference_low:+.2f}, {difference_high:+.2f}]"
    listed = f"{numbers.format(**specific)} beyond the control span, {numbers.format(**against_dense)} beyond dense"
    if all(more):
        return f"content moves into the window's tokens: {listed}"
    if more[0]:
        return f"the window's tokens carry content, but no more than without eviction: {listed}"
    return f"no sign that content moves into the window's tokens: {listed}"
