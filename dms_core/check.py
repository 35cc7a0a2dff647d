"""Does DMS do on this model what it says?  Each property that is tested on tiny models, tried on one that is given.

Gates with random weights and a short window evict about half of what leaves it, so that an error shows.
"""

import tempfile
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor
from transformers import PreTrainedModel

from dms_core.cache.dms import DMSCache
from dms_core.checkpoint import load_gates, save_gates
from dms_core.config import DMSConfig
from dms_core.model import attach, detach

TOLERANCE = 2e-3  # of the largest logit
CONFIG = DMSConfig(window=3, scale=10.0, offset=0.0)
SHORT, LONG = 9, 24  # tokens of a prompt, of a text


@dataclass
class Report:
    """What was found.  ``passes``: no check failed, and the model was not refused."""

    refused: str | None = None  # why gates cannot be put on the model
    checks: dict[str, bool] = field(default_factory=dict)
    details: dict[str, str] = field(default_factory=dict)  # of checks that failed

    @property
    def passes(self) -> bool:
        return self.refused is None and all(self.checks.values())


class _Checks:
    """The checks of one model with gates; each yields what it found and what it should have."""

    def __init__(self, model: PreTrainedModel, seed: int) -> None:
        self.model, words = model, torch.Generator().manual_seed(seed)
        size = model.config.get_text_config().vocab_size
        self.ids = torch.randint(3, min(size, 1000), (2, LONG), generator=words).to(model.device)
        with torch.no_grad():
            self.original = model(self.ids, use_cache=False).logits
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            attach(model, CONFIG)
        weights = torch.Generator().manual_seed(seed)
        for attention in model.dms.layout.full:
            weight = attention.module.dms_gate.proj.weight
            weight.data = torch.randn(weight.shape, generator=weights).to(weight)
        with torch.no_grad():
            self.whole = model(self.ids, use_cache=False).logits

    def gates_off_is_the_original(self) -> Iterator[tuple[Tensor, Tensor]]:
        with self.model.dms.disabled():
            yield self.model(self.ids, use_cache=False).logits, self.original

    def silent_gates_are_the_original(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Scale, sinks, windows and chunks are respected: our attention without any eviction is the model's own."""
        self.model.dms.evicting = False
        try:
            yield self.model(self.ids, use_cache=False).logits, self.original
            yield self._cached([SHORT] + [1] * (LONG - SHORT)), self.original
        finally:
            self.model.dms.evicting = True

    def cached_is_uncached(self) -> Iterator[tuple[Tensor, Tensor]]:
        yield self._cached([SHORT] + [1] * (LONG - SHORT)), self.whole
        yield self._cached([1] * LONG), self.whole

    def turns_are_uncached(self) -> Iterator[tuple[Tensor, Tensor]]:
        yield self._cached([SHORT, 1, 1, 5, 1, LONG - SHORT - 8]), self.whole

    def padding_changes_nothing(self) -> Iterator[tuple[Tensor, Tensor]]:
        for cache in (False, True):
            mask = torch.ones_like(self.ids)
            mask[0, :5] = 0
            ids = self.ids * mask
            inputs = {"attention_mask": mask, "position_ids": (mask.cumsum(1) - 1).clamp_min(0), "use_cache": cache}
            alone = self.model(self.ids[:1, 5:], use_cache=False).logits[0]
            yield self.model(ids, **inputs).logits[0, 5:], alone

    def generate_is_the_uncached_argmax(self) -> Iterator[tuple[Tensor, Tensor]]:
        prompt = {"input_ids": self.ids[:1, :SHORT], "attention_mask": torch.ones_like(self.ids[:1, :SHORT])}
        ends = {"eos_token_id": None, "pad_token_id": 0}
        said = self.model.generate(**prompt, **ends, max_new_tokens=12, do_sample=False)
        logits = self.model(said[:, :-1], use_cache=False).logits[0, SHORT - 1 :]
        chosen = logits.gather(1, said[0, SHORT:, None])[:, 0]
        yield chosen, logits.amax(1)

    def saved_gates_load(self) -> Iterator[tuple[Tensor, Tensor]]:
        with tempfile.TemporaryDirectory() as directory, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            save_gates(self.model, directory)
            detach(self.model)
            yield self.model(self.ids, use_cache=False).logits, self.original
            load_gates(self.model, directory)
        yield self.model(self.ids, use_cache=False).logits, self.whole

    def rows_are_independent(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Rows of different lengths, copied to other places and selected, go on as they would alone."""
        short, ids = SHORT - 4, self.ids
        mask = torch.ones_like(ids[:, :SHORT])
        mask[1, : SHORT - short] = 0
        prompts = torch.cat([ids[:1, :SHORT], torch.nn.functional.pad(ids[1:, :short], (SHORT - short, 0))])
        cache = DMSCache.for_model(self.model, page=4)
        inputs = {"attention_mask": mask, "position_ids": (mask.cumsum(1) - 1).clamp_min(0)}
        self.model(prompts, **inputs, past_key_values=cache)
        rows, place = cache.empty_like(3), torch.tensor([SHORT, short], device=ids.device)
        rows.put_rows(torch.tensor([2, 0]), cache, torch.tensor([0, 1]))
        rows.put_rows(torch.tensor([1]), cache, torch.tensor([1]))
        source = torch.tensor([1, 1, 0], device=ids.device)
        for step in range(6):
            if step == 3:
                rows.batch_select_indices(torch.tensor([2, 0], device=ids.device))
                source = source[[2, 0]]
            at = place[source] + step
            inputs = {"attention_mask": torch.ones_like(at)[:, None], "position_ids": at[:, None]}
            logits = self.model(ids[source, at][:, None], **inputs, past_key_values=rows).logits[:, 0]
            yield logits, self.whole[source, at]

    def gates_learn(self) -> Iterator[tuple[Tensor, Tensor]]:
        gates = self.model.dms.gate_parameters()
        learnt = [p for p in self.model.parameters() if p.requires_grad and not any(p is gate for gate in gates)]
        for parameter in learnt:
            parameter.requires_grad_(False)
        self.model.train()
        try:
            with torch.enable_grad():
                self.model(self.ids, use_cache=False).logits.float().logsumexp(-1).mean().backward()
            good = [gate.grad is not None and bool(gate.grad.isfinite().all() and gate.grad.any()) for gate in gates]
            yield torch.tensor(good).float(), torch.ones(len(good))
        finally:
            self.model.eval()
            for parameter in learnt:
                parameter.requires_grad_(True)

    def _cached(self, pieces: list[int]) -> Tensor:
        """Logits of the text, put into a cache piece by piece."""
        cache = DMSCache.for_model(self.model, page=4)
        return torch.cat([self.model(x, past_key_values=cache).logits for x in self.ids.split(pieces, 1)], 1)


CHECKS: tuple[Callable, ...] = (
    _Checks.gates_off_is_the_original,
    _Checks.silent_gates_are_the_original,
    _Checks.cached_is_uncached,
    _Checks.turns_are_uncached,
    _Checks.padding_changes_nothing,
    _Checks.generate_is_the_uncached_argmax,
    _Checks.rows_are_independent,
    _Checks.gates_learn,
    _Checks.saved_gates_load,
)


def check(model: PreTrainedModel, seed: int = 0) -> Report:
    """Try everything on a model without gates, which is afterwards as it was.

    A few forward passes over 24 tokens.  Raises ValueError for a model that has gates, or is not in fp32.
    """
    if getattr(model, "dms", None) is not None:
        raise ValueError("the model has DMS gates: check it before dms_core.attach, or after dms_core.detach")
    if model.dtype not in (torch.float32, torch.float64):
        raise ValueError(f"model of {model.dtype}: must be torch.float32, since rounding flips decisions near zero")
    report, training = Report(), [module for module in model.modules() if module.training]
    try:
        checks = _Checks(model.eval(), seed)
    except Exception as error:  # whatever the model's code raises
        if getattr(model, "dms", None) is None and isinstance(error, ValueError):  # by attach
            report.refused = str(error)
            return report
        report.checks["runs with gates"] = False
        report.details["runs with gates"] = _words(error)
        if getattr(model, "dms", None) is not None:
            detach(model)
        return report
    tolerance = TOLERANCE * float(checks.original.abs().max())
    for function in CHECKS:
        name = function.__name__.replace("_", " ")
        try:
            with torch.no_grad():
                gaps = [float((found.float() - right.float()).abs().max()) for found, right in function(checks)]
            report.checks[name] = max(gaps) <= tolerance  # False for NaN
            problem = f"differs by {max(gaps):.2g}, at most {tolerance:.2g} is rounding"
        except Exception as error:  # whatever the model's code raises
            report.checks[name], problem = False, _words(error)
        if not report.checks[name]:
            report.details[name] = problem
    if getattr(model, "dms", None) is not None:
        detach(model)
    for module in training:
        module.training = True
    return report


def _words(error: Exception) -> str:
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
