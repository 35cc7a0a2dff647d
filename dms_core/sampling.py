"""Sampling with continuous batching: finished chains' rows are refilled from the queue while the others go on.

Refills wait until an eighth of the rows is free, so that prompts are prefilled together.

Every (problem, chain) has a random stream of its own, so what a chain says does not depend on the batch size, on
the order, or on its neighbours.  On one machine's CPU, with the same versions and number of threads, it is the same
bit for bit; elsewhere, and on a GPU, where sums are divided by the size of the batch, they may round otherwise, and
where two tokens are nearly as likely a chain may then take another way.
Budgets are counted as in paper section 5.1: KV reads are the items attended to at each decode step, summed over steps,
per KV head (mean over layers and heads); prefill does not count.
Wall time is counted too: a prefill's is divided among the rows that it fills, a decode step's among those under way.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from dms_core.cache.base import RowCache
from dms_core.cache.dms import DMSCache, check_kv_cache_dtype
from dms_core.config import check_numbers
from dms_core.graphs import StepGraph, why_no_graph
from dms_core.pick import padding_token, pick_tokens, stop_tokens
from dms_core.rope import check_length

LOOK = 16  # decode steps between two looks at which chains have ended, where looking waits for the device


@dataclass(frozen=True)
class SamplingConfig:
    """How chains are drawn.  Raises ValueError for a value that its field may not have.

    >>> SamplingConfig(max_new_tokens=1024, temperature=0.0).top_p
    0.95
    """

    max_new_tokens: int  # L
    temperature: float = 0.6  # 0: greedy
    top_p: float = 0.95
    batch: int = 64  # rows decoded together
    seed: int = 0
    stride: int = 16  # generated tokens between two entries of a chain's live and reads
    page: int | None = None  # tokens a cache page; None: 64 on CUDA, else 8
    top_k: int | None = None  # the likeliest tokens that are sampled from; None: all
    min_p: float = 0.0  # least probability, as a share of the likeliest token's
    kv_cache_dtype: str = "auto"  # or int8, see DMSCache

    def __post_init__(self) -> None:
        check_numbers(self, "max_new_tokens", "batch", "stride", "page", "top_k", whole=True, least=1)
        check_numbers(self, "seed", whole=True, least=0)
        check_numbers(self, "temperature", "min_p", least=0)
        check_numbers(self, "top_p")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p {self.top_p}: must lie in (0, 1]")
        if not self.min_p < 1:
            raise ValueError(f"min_p {self.min_p}: must lie in [0, 1)")
        check_kv_cache_dtype(self.kv_cache_dtype)


@dataclass(frozen=True)
class Chain:
    """One chain: its tokens, and its budget after 0, stride, 2 stride, ... generated tokens and at its end."""

    problem: int
    chain: int
    tokens: list[int]  # without the stop token
    finished: bool  # it wrote a stop token
    prompt_tokens: int
    prompt_kept: float  # tokens per KV head that stay whatever follows: what the prompt's chains share for good
    live: list[float]  # live items per KV head, the most so far
    reads: list[float]  # cumulative KV reads per KV head
    # Cumulative share of the wall time, prefill's too.
    seconds: list[float] = field(default_factory=list, compare=False, repr=False)


def chain_uniforms(seed: int, problem: int, chain: int, length: int) -> np.ndarray:
    """The chain's random numbers in [0, 1): one a token."""
    return np.random.Generator(np.random.Philox(np.random.SeedSequence([seed, problem, chain]))).random(length)


def chain_stream(seed: int, problem: int, chain: int) -> int:
    """The number of the chain's random stream for a cache that draws: 0 .. 2^63 - 1."""
    return int(np.random.SeedSequence([seed, problem, chain]).generate_state(1, np.uint64)[0] >> np.uint64(1))


def pad_left(prompts: Sequence[Sequence[int]], pad: int) -> tuple[Tensor, Tensor, Tensor]:
    """Token ids, padding mask and positions of prompts that end together: (B, T) each, int64."""
    rows = [torch.tensor(prompt) for prompt in prompts]
    ids = pad_sequence(rows, batch_first=True, padding_value=pad, padding_side="left")
    mask = pad_sequence([torch.ones_like(row) for row in rows], batch_first=True, padding_side="left")
    return ids, mask, (mask.cumsum(1) - 1).clamp_min(0)


@torch.inference_mode()  # as a decorator it leaves the caller's mode alone between two chains
def sample_chains(
    model,
    tokenizer,
    prompts: Sequence[Sequence[int]],
    jobs: Sequence[tuple[int, int]],
    config: SamplingConfig,
    make_cache: Callable[..., RowCache] | None = None,
    stop: Sequence[int] | None = None,
) -> Iterator[Chain]:
    """Yield the chains of ``jobs``, pairs (index into prompts, chain number), in the order in which they end.

    ``model`` has DMS gates (inside ``model.dms.disabled()`` it samples from the dense original).  ``make_cache``
    (model, max_new_tokens) makes other caches than DMS's, see ``dms_core.baselines``.  ``stop``: the tokens that end a
    chain (default: the tokenizer's <eos> and those of the model's generation_config; empty: none).  Raises ValueError
    for an empty prompt, for lengths at which the model's rope depends on a row's neighbours (dms_core.rope), and for 8
    bits in other caches.

    >>> chains = sample_chains(attach(model, DMSConfig()), tokenizer, [[5, 6, 7]], [(0, 0)], SamplingConfig(4))
    >>> next(chains).prompt_tokens
    3
    """
    if make_cache is not None and config.kv_cache_dtype != "auto":
        raise ValueError(f"kv_cache_dtype {config.kv_cache_dtype!r}: must be auto with another cache than DMS's")
    for problem, _ in jobs:
        if not len(prompts[problem]):
            raise ValueError(f"prompt {problem} is empty: it must have at least one token")
    longest = max((len(prompts[problem]) for problem, _ in jobs), default=0)
    check_length(model.config, longest + config.max_new_tokens)
    stop = stop_tokens(model, tokenizer) if stop is None else stop
    batch = _Batch(model, padding_token(model, tokenizer), set(stop), prompts, list(jobs), config, make_cache)
    try:
        yield from batch.run()
    finally:
        vars(batch).pop("graph", None)  # it refers to the batch: the cache would stay until the garbage collector comes


class _Batch:
    """The rows under way.  What a step changes lies on the model's device; the host knows each row's job."""

    cache: RowCache  # this and the graph are there once the first prompts have been prefilled
    graph: StepGraph
    PER_ROW = ("made", "position", "active", "stepped", "last", "tokens", "uniforms", "live", "reads", "kept")

    def __init__(
        self, model, pad: int, stop: set[int], prompts, jobs: list[tuple[int, int]], config: SamplingConfig, make_cache
    ) -> None:
        self.model, self.prompts, self.queue, self.config = model, prompts, jobs[::-1], config
        self.pad, self.stop = pad, stop
        size = min(config.batch, len(jobs))
        page = config.page or (64 if model.device.type == "cuda" else 8)
        stored = config.kv_cache_dtype
        self.make_cache = make_cache or (lambda model, _: DMSCache.for_model(model, page, kv_cache_dtype=stored))
        self.device, self.look = model.device, 1 if model.device.type == "cpu" else LOOK
        self.jobs: list[tuple[int, int] | None] = [None] * size
        self.since = [0] * size  # the step in which the row's chain began
        self.prefill_seconds = [0.0] * size  # its share of the prefill
        self.seconds = {0: 0.0}  # step: a row's share of the decode steps up to it, as far back as a row needs it
        self.step = self.shrunk = 0
        on = {"device": self.device}
        self.stop_ids = torch.tensor(sorted(stop), dtype=torch.long, **on)
        self.made = torch.zeros(size, dtype=torch.long, **on)  # generated tokens
        self.position = torch.zeros(size, dtype=torch.long, **on)
        self.active, self.stepped = (torch.zeros(size, dtype=torch.bool, **on) for _ in range(2))
        self.last = torch.zeros(size, 1, dtype=torch.long, **on)
        # One column more than tokens: rows that are not active write there, and it is not read.
        self.tokens = torch.zeros(size, config.max_new_tokens + 1, dtype=torch.long, **on)
        self.uniforms = torch.zeros(size, config.max_new_tokens + 1, **on)
        entries = config.max_new_tokens // config.stride + 1
        self.live, self.reads = (torch.zeros(size, entries, **on) for _ in range(2))
        self.kept = torch.zeros(size, **on)  # of the prompt

    def run(self) -> Iterator[Chain]:
        began = time.perf_counter()
        while self.queue or any(self.jobs):
            admitted: list[int] = []
            idle = [row for row, job in enumerate(self.jobs) if job is None]
            if self.queue and (len(idle) > len(self.jobs) // 8 or len(idle) >= len(self.queue)):
                admitted = idle[: len(self.queue)]
                self._admit(admitted)
            else:
                if not self.queue and 2 * len(idle) >= len(self.jobs) > 8:
                    self._shrink()
                for _ in range(min(self.look, self.config.max_new_tokens - min(self._ages()))):
                    self._decode()
            active = self.active.tolist()  # waits for the device
            looked = time.perf_counter()
            self._charge(looked - began, admitted)
            chains = list(self._finish([row for row, on in enumerate(active) if self.jobs[row] and not on]))
            paused = time.perf_counter()
            yield from chains
            began = looked + time.perf_counter() - paused  # what the caller did meanwhile is no time of ours

    def _charge(self, seconds: float, admitted: list[int]) -> None:
        """Divide wall time among the rows that were ``admitted`` in it, else among the steps and the rows under way."""
        for row in admitted:
            self.prefill_seconds[row] = seconds / len(admitted)
        last = next(reversed(self.seconds))
        if steps := self.step - last:
            share = seconds / steps / sum(job is not None for job in self.jobs)
            self.seconds |= {last + step: self.seconds[last] + share * step for step in range(1, steps + 1)}

    def _admit(self, rows: list[int]) -> None:
        """Prefill prompts for idle rows, each distinct prompt once, and sample their first tokens."""
        jobs = [self.queue.pop() for _ in rows]
        distinct = list(dict.fromkeys(problem for problem, _ in jobs))
        prefilled, logits = self._prefill([self.prompts[p] for p in distinct])
        if not hasattr(self, "cache"):
            self.cache = prefilled.empty_like(len(self.jobs))
            self.graph = StepGraph(
                self._advance,
                moved=lambda: self.cache.moves + self.shrunk,
                ran=self.cache.count_step,
                failed=partial(setattr, self.model.dms, "no_graph"),
                why_not=why_no_graph(self.model, self.cache),
            )
        at = torch.tensor(rows, device=self.device)
        source = torch.tensor([distinct.index(problem) for problem, _ in jobs], device=self.device)
        self.cache.put_rows(at, prefilled, source)
        self.kept[at] = self.model.dms.split.mean(prefilled.lasting_tokens())[source]
        self.cache.name_streams(at, torch.tensor([chain_stream(self.config.seed, *job) for job in jobs]))
        for row, job in zip(rows, jobs, strict=True):
            self.jobs[row], self.since[row] = job, self.step
        first = min(since for job, since in zip(self.jobs, self.since, strict=True) if job)
        self.seconds = {step: seconds for step, seconds in self.seconds.items() if step >= first}
        under_way = zip(self.jobs, self.since, strict=True)
        self.cache.columns = max(len(self.prompts[job[0]]) + self.step - since for job, since in under_way if job)
        draws = np.stack([chain_uniforms(self.config.seed, *job, self.config.max_new_tokens) for job in jobs])
        self.uniforms[at, :-1] = torch.from_numpy(draws).to(self.uniforms)
        self.position[at] = torch.tensor([len(self.prompts[problem]) for problem, _ in jobs], device=self.device)
        self.made[at] = 0
        self._log(torch.zeros_like(self.active).index_fill_(0, at, True))
        token = self._pick(logits[source], self.uniforms[at, 0])
        self.last[at], self.tokens[at, 0] = token[:, None], token
        self.made[at] = 1
        self.active[at] = self._goes_on(token) & (self.config.max_new_tokens > 1)
        if self.config.stride == 1:
            self._log(torch.zeros_like(self.active).index_fill_(0, at, True))

    def _prefill(self, prompts) -> tuple[RowCache, Tensor]:
        ids, mask, positions = (x.to(self.device) for x in pad_left(prompts, self.pad))
        cache = self.make_cache(self.model, self.config.max_new_tokens)
        return cache, self._forward(ids, positions, mask, cache)

    def _decode(self) -> None:
        """Feed every active row its last token and sample the next one; waits for the device to make room alone."""
        if self.cache.make_room():
            self.model.dms.check_logits()
        self.graph.run()
        self.step += 1
        if any(age % self.config.stride == 0 for age in self._ages()):
            self._log(self.stepped & (self.made % self.config.stride == 0))

    def _advance(self) -> None:
        """The step on the device, of static shapes."""
        self.stepped.copy_(self.active)
        logits = self._forward(self.last, self.position[:, None], self.active[:, None], self.cache)
        at = self.made[:, None]
        token = self._pick(logits, self.uniforms.gather(1, at)[:, 0])
        self.last.copy_(token[:, None])
        self.tokens.scatter_(1, at, self.last)
        self.position += self.active
        self.made += self.active
        self.active &= self._goes_on(token) & (self.made < self.config.max_new_tokens)

    def _ages(self) -> set[int]:
        """Tokens that the chains under way have made, if they go on."""
        return {self.step - since + 1 for job, since in zip(self.jobs, self.since, strict=True) if job}

    def _goes_on(self, token: Tensor) -> Tensor:
        """Which of the tokens (S,) end no chain, without waiting for the device."""
        return (token[:, None] != self.stop_ids).all(-1)

    def _pick(self, logits: Tensor, uniforms: Tensor) -> Tensor:
        chosen = self.config
        token = pick_tokens(logits, uniforms, chosen.temperature, chosen.top_p, chosen.top_k, chosen.min_p)
        return self.model.dms.split.agree(token)

    def _forward(self, ids: Tensor, positions: Tensor, mask: Tensor, cache: RowCache) -> Tensor:
        inputs = {"input_ids": ids, "position_ids": positions, "attention_mask": mask}
        return self.model(**inputs, past_key_values=cache, use_cache=True, logits_to_keep=1).logits[:, -1]

    def _log(self, rows: Tensor) -> None:
        """Enter the budget so far of ``rows`` (B,) bool."""
        at = (self.made // self.config.stride)[:, None]
        for log, now in zip((self.live, self.reads), self._budget(), strict=True):
            log.scatter_(1, at, torch.where(rows[:, None], now[:, None], log.gather(1, at)))

    def _budget(self) -> tuple[Tensor, Tensor]:
        """Most live items and reads so far per KV head, means over layers and heads: (B,) each."""
        return tuple(map(self.model.dms.split.mean, (self.cache.peak_tokens(), self.cache.kv_reads())))

    def _finish(self, ended: list[int]) -> Iterator[Chain]:
        """The chains of the rows that have ended since the last look."""
        if not ended:
            return
        self.model.dms.check_logits()
        rows = torch.tensor(ended, device=self.device)
        state = [x[rows].tolist() for x in (self.made, self.tokens, self.kept, self.live, self.reads, *self._budget())]
        for row, made, tokens, kept, live, reads, *end in zip(ended, *state, strict=True):
            tokens, entries = tokens[:made], made // self.config.stride + 1
            finished = tokens[-1] in self.stop
            problem, chain = self.jobs[row]
            live, reads = ([*log[:entries], last] for log, last in zip((live, reads), end, strict=True))
            tokens = tokens[:-1] if finished else tokens
            prompt, seconds = len(self.prompts[problem]), self._seconds_of(row, entries)
            yield Chain(problem, chain, tokens, finished, prompt, kept, live, reads, seconds)
            self.jobs[row] = None
        self.cache.reset_rows(rows)

    def _seconds_of(self, row: int, entries: int) -> list[float]:
        """The row's wall time after 0, stride, ... tokens and now, when the host sees that its chain has ended."""
        since, stride = self.since[row], self.config.stride
        ends = [*(since + max(entry * stride - 1, 0) for entry in range(entries)), self.step]
        return [self.prefill_seconds[row] + self.seconds[end] - self.seconds[since] for end in ends]

    def _shrink(self) -> None:
        """Nothing is queued: go on with the active rows alone."""
        rows = [row for row, job in enumerate(self.jobs) if job]
        for name in ("jobs", "since", "prefill_seconds"):
            setattr(self, name, [getattr(self, name)[row] for row in rows])
        self.shrunk += 1
        at = torch.tensor(rows, device=self.device)
        self.cache.batch_select_indices(at)
        for name in self.PER_ROW:
            setattr(self, name, getattr(self, name)[at])
