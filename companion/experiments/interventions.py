"""Interventions on what a token leaves behind: evict it everywhere, exchange its digit, patch what others wrote.

A token j is evicted everywhere if the gates of all layers and KV heads say so in the row that decides about it,
j + lag: these are forced, and no others, since a row decides about one token.  Queries up to j + w still see it, and
write what they write without forcing, since no decision is among their inputs: what they hold of j, they hold anyway.

A patch (interchange intervention) puts what some tokens wrote in one run into another: keys and values (outputs of
k_proj and v_proj) and the gate's logit, in all layers.

An exchanged digit acts through keys and values alone: the gates of its row, which decide about another token, are held.
So where j is evicted everywhere, a query behind j + w knows of it only what the tokens j + 1 .. j + w wrote: with these
from the run that has another digit at j, it says exactly what it says in that run.
"""

import contextlib
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from companion.experiments.lookups import Case

RUNS = (  # of a look-up
    "clean",
    "exchanged",  # another digit at the source, whose gates say what they say in the clean run
    "window",  # clean; the w tokens behind the source write as in the exchanged run
    "control",  # clean; so do the next w tokens, and no others
    "forced",  # clean, the source evicted everywhere
    "forced, exchanged",
    "forced, window",  # the source evicted in both runs
    "forced, control",
    "forced, other",  # clean; instead of the source another digit of its part of the document is evicted everywhere
)
MEASURES = (  # at the query
    "right",  # is the right digit the most likely token?
    "follows",  # is the other digit, which an exchanged source has?
    "p_right",
    "p_other",
    "odds",  # log-odds of the right digit over the other
)
EVICT = 1e4  # what a gate reads that evicts at any scale and offset


@contextlib.contextmanager
def _writing(model, act: Callable[[tuple, Tensor], Tensor]) -> Iterator[None]:
    """Inside, ``act(place, output)`` replaces what tokens write: keys, values (B, T, H D), gate inputs (B, H, T)."""
    with contextlib.ExitStack() as hooks:
        for layer, block in enumerate(model.get_decoder().layers):
            for name in ("k_proj", "v_proj", "dms_gate"):
                module, place = getattr(block.self_attn, name), (layer, name)
                hook = module.register_forward_hook(lambda m, i, output, place=place: act(place, output))
                hooks.enter_context(hook)  # leaving it removes the hook
        yield


@torch.inference_mode()
def run(
    model, ids: Tensor, evicted: Tensor | None = None, patched: Tensor | None = None, written: dict | None = None
) -> tuple[Tensor, dict]:
    """Logits (B, T, V) of ids (B, T), and what every token wrote, by (layer, module).

    evicted: a token of each row (B,) that is evicted everywhere.  patched: the tokens (B, T) that write what stands in
    ``written``, in the modules that it names.  Raises ValueError for a model without adapter gates.
    """
    if getattr(model, "dms", None) is None or model.dms.config.gate != "adapter":
        raise ValueError("a model without adapter gates: must have them, since what they read is what is forced")
    found = {}

    def act(place: tuple, output: Tensor) -> Tensor:
        of_gate = place[1] == "dms_gate"
        if patched is not None and place in written:
            output = torch.where(patched[:, None, :] if of_gate else patched[:, :, None], written[place], output)
        if of_gate and evicted is not None:
            output = output.clone()
            output[torch.arange(len(ids)), :, evicted + model.dms.config.lag] = EVICT
        found[place] = output
        return output

    with _writing(model, act):
        return model(input_ids=ids, use_cache=False).logits, found


def gates_of(written: dict) -> dict:
    return {place: output for place, output in written.items() if place[1] == "dms_gate"}


def make_batch(cases: Sequence[Case]) -> tuple[Tensor, Tensor]:
    """Clean and exchanged token ids (B, T); padding is on the right, where no query sees it."""
    clean = pad_sequence([torch.tensor(case.ids) for case in cases], batch_first=True)
    exchanged = clean.clone()
    exchanged[range(len(cases)), [case.source for case in cases]] = torch.tensor([case.wrong for case in cases])
    return clean, exchanged


def span(cases: Sequence[Case], tokens: int, first: int, count: int) -> Tensor:
    """Marks (B, T) of ``count`` tokens, the first of them ``first`` behind the source."""
    behind = torch.arange(tokens) - torch.tensor([[case.source] for case in cases])
    return (behind >= first) & (behind < first + count)


def interchange(model, cases: Sequence[Case], window: int) -> list[dict]:
    """Per case {run: MEASURES as numbers}, and "kept": the KV heads of all layers that keep the source, clean run."""
    clean, exchanged = (ids.to(model.device) for ids in make_batch(cases))
    source, other = (torch.tensor([getattr(c, name) for c in cases]).to(model.device) for name in ("source", "other"))
    starts = {"window": 1, "control": 1 + window}
    at_source = span(cases, clean.shape[1], 0, 1).to(model.device)
    spans = {name: span(cases, clean.shape[1], first, window).to(model.device) for name, first in starts.items()}
    found = {"forced, other": run(model, clean, other)[0]}
    for first, prefix, evicted in (("forced", "forced, ", source), ("clean", "", None)):
        found[first], written = run(model, clean, evicted)
        gone = torch.stack([decisions.bool() for decisions in model.dms.step.evicted.values()])  # (layers, B, H, T)
        found[f"{prefix}exchanged"], written = run(model, exchanged, evicted, at_source, gates_of(written))
        for name, patched in spans.items():
            found[prefix + name] = run(model, clean, evicted, patched, written)[0]
    readings = {name: _read(found[name], cases) for name in RUNS}
    return [
        {name: rows[i] for name, rows in readings.items()} | {"kept": int((~gone[:, i, :, case.source]).sum())}
        for i, case in enumerate(cases)
    ]


def _read(logits: Tensor, cases: Sequence[Case]) -> list[list[float]]:
    """MEASURES of each case, at its query."""
    at = logits[range(len(cases)), [case.query for case in cases]].float().log_softmax(-1).cpu()  # (B, V)
    right, wrong = (torch.tensor([[getattr(case, name)] for case in cases]) for name in ("right", "wrong"))
    likely, p, q = at.argmax(-1, keepdim=True), at.gather(1, right), at.gather(1, wrong)
    return torch.cat([likely == right, likely == wrong, p.exp(), q.exp(), p - q], 1).tolist()
