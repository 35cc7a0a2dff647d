"""Sampling with continuous batching: finished chains' rows are refilled from the queue while the others go on.

Refills wait until an eighth of the rows is free, so that prompts are prefilled together.

Every (problem, chain) has a random stream of its own, so what a chain says does not depend on the batch size, on
the order, or on its neighbours.  Budgets are counted as in paper section 5.1: KV reads are the items attended to
at each decode step, summed over steps, per KV head (mean over layers and heads); prefill does not count.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from dms_core.cache.base import RowCache
from dms_core.cache.dms import DMSCache
from dms_core.config import check_numbers


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
    page: int = 8  # tokens a cache page

    def __post_init__(self) -> None:
        check_numbers(self, "max_new_tokens", "batch", "stride", "page", whole=True, least=1)
        check_numbers(self, "seed", whole=True, least=0)
        check_numbers(self, "temperature", least=0)
        check_numbers(self, "top_p")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p {self.top_p}: must lie in (0, 1]")


@dataclass(frozen=True)
class Chain:
    """One chain: its tokens, and its budget after 0, stride, 2 stride, ... generated tokens and at its end."""

    problem: int
    chain: int
    tokens: list[int]  # without <eos>
    finished: bool  # it wrote <eos>
    prompt_tokens: int
    live: list[float]  # live items per KV head
    reads: list[float]  # cumulative KV reads per KV head


def chain_uniforms(seed: int, problem: int, chain: int, length: int) -> np.ndarray:
    """The chain's random numbers in [0, 1): one a token."""
    return np.random.Generator(np.random.Philox(np.random.SeedSequence([seed, problem, chain]))).random(length)


def chain_stream(seed: int, problem: int, chain: int) -> int:
    """The number of the chain's random stream for a cache that draws: 0 .. 2^63 - 1."""
    return int(np.random.SeedSequence([seed, problem, chain]).generate_state(1, np.uint64)[0] >> np.uint64(1))


def pick_tokens(logits: Tensor, uniforms: Tensor, temperature: float, top_p: float) -> Tensor:
    """One token a row by inverse CDF over the nucleus.  logits (S, V), uniforms (S,); returns (S,)."""
    if temperature == 0:
        return logits.argmax(-1)
    p, token = (logits.float() / temperature).softmax(-1).sort(dim=-1, descending=True, stable=True)
    before = p.cumsum(-1) - p
    p = torch.where(before < top_p, p, 0.0)
    cdf = p.cumsum(-1)
    chosen = (cdf <= uniforms[:, None].to(cdf) * cdf[:, -1:]).sum(-1, keepdim=True)
    return token.gather(1, chosen.clamp_max((p > 0).sum(-1, keepdim=True) - 1))[:, 0]


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
) -> Iterator[Chain]:
    """Yield the chains of ``jobs``, pairs (index into prompts, chain number), in the order in which they end.

    ``model`` has DMS gates (inside ``model.dms.disabled()`` it samples from the dense original).  ``make_cache``
    (model, max_new_tokens) makes other caches than DMS's, see ``dms_core.baselines``.  Raises ValueError for an empty
    prompt.

    >>> chains = sample_chains(attach(model, DMSConfig()), tokenizer, [[5, 6, 7]], [(0, 0)], SamplingConfig(4))
    >>> next(chains).prompt_tokens
    3
    """
    for problem, _ in jobs:
        if not len(prompts[problem]):
            raise ValueError(f"prompt {problem} is empty: it must have at least one token")
    yield from _Batch(model, tokenizer, prompts, list(jobs), config, make_cache).run()


class _Batch:
    """The rows under way: per row its job, position, tokens so far and log."""

    def __init__(self, model, tokenizer, prompts, jobs, config: SamplingConfig, make_cache) -> None:
        self.model, self.prompts, self.queue, self.config = model, prompts, jobs[::-1], config
        self.pad, self.eos = tokenizer.pad_token_id, tokenizer.eos_token_id
        self.size = min(config.batch, len(jobs))
        self.make_cache = make_cache or (lambda model, _: DMSCache.for_model(model, config.page))
        self.cache: RowCache | None = None
        self.jobs: list[tuple[int, int] | None] = [None] * self.size
        self.made = torch.zeros(self.size, dtype=torch.long)  # generated tokens
        self.position = torch.zeros(self.size, dtype=torch.long)
        self.active = torch.zeros(self.size, dtype=torch.bool)
        self.tokens = torch.zeros(self.size, config.max_new_tokens, dtype=torch.long)
        self.uniforms = torch.zeros(self.size, config.max_new_tokens, dtype=torch.float64)
        entries = config.max_new_tokens // config.stride + 1
        self.live, self.reads = (torch.zeros(self.size, entries) for _ in range(2))

    def run(self) -> Iterator[Chain]:
        while self.queue or self.active.any():
            idle = int((~self.active).sum())
            if self.queue and (idle > self.size // 8 or idle >= len(self.queue)):
                yield from self._finish(self._admit())
            elif not self.queue and 2 * idle >= len(self.active) > 8:
                self._shrink()
            if self.active.any():
                yield from self._finish(self._decode())

    def _admit(self) -> Tensor:
        """Prefill prompts for the idle rows, each distinct prompt once, and sample their first tokens."""
        rows = (~self.active).nonzero()[:, 0][: len(self.queue)]
        jobs = [self.queue.pop() for _ in rows]
        distinct = list(dict.fromkeys(problem for problem, _ in jobs))
        prefilled, logits = self._prefill([self.prompts[p] for p in distinct])
        source = torch.tensor([distinct.index(problem) for problem, _ in jobs])
        if self.cache is None:
            self.cache = prefilled.empty_like(self.size)
        at = rows.to(self.model.device)
        self.cache.put_rows(at, prefilled, source.to(self.model.device))
        self.cache.name_streams(at, torch.tensor([chain_stream(self.config.seed, *job) for job in jobs]))
        for row, job in zip(rows.tolist(), jobs, strict=True):
            self.jobs[row] = job
            self.uniforms[row] = torch.from_numpy(chain_uniforms(self.config.seed, *job, self.config.max_new_tokens))
            self.position[row] = len(self.prompts[job[0]])
        self.made[rows] = 0
        self.active[rows] = True
        self._log(rows)
        return self._take(rows, logits[source])

    def _prefill(self, prompts) -> tuple[RowCache, Tensor]:
        ids, mask, positions = pad_left(prompts, self.pad)
        cache = self.make_cache(self.model, self.config.max_new_tokens)
        return cache, self._forward(ids, positions, mask, cache)

    def _decode(self) -> Tensor:
        """Feed every active row its last token and sample the next one."""
        last = self.tokens.gather(1, (self.made - 1).clamp_min(0)[:, None])
        logits = self._forward(last, self.position[:, None], self.active[:, None], self.cache)
        self.position += self.active
        rows = self.active.nonzero()[:, 0]
        return self._take(rows, logits[rows])

    def _forward(self, ids: Tensor, positions: Tensor, mask: Tensor, cache: RowCache) -> Tensor:
        inputs = {"input_ids": ids, "position_ids": positions, "attention_mask": mask}
        inputs = {name: x.to(self.model.device) for name, x in inputs.items()}
        return self.model(**inputs, past_key_values=cache, use_cache=True, logits_to_keep=1).logits[:, -1].cpu()

    def _take(self, rows: Tensor, logits: Tensor) -> Tensor:
        """Sample for ``rows``; returns the rows whose chain has ended."""
        uniforms = self.uniforms[rows, self.made[rows]]
        token = pick_tokens(logits, uniforms, self.config.temperature, self.config.top_p)
        self.tokens[rows, self.made[rows]] = token
        self.made[rows] += 1
        self._log(rows[self.made[rows] % self.config.stride == 0])
        return rows[(token == self.eos) | (self.made[rows] == self.config.max_new_tokens)]

    def _log(self, rows: Tensor) -> None:
        if len(rows):
            at = self.made[rows] // self.config.stride
            self.live[rows, at], self.reads[rows, at] = self._budget(rows)

    def _budget(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Live items and reads so far per KV head, means over layers and heads: (N,) each."""
        return tuple(x.float().mean((0, 2)).cpu()[rows] for x in (self.cache.live_tokens(), self.cache.kv_reads()))

    def _finish(self, rows: Tensor) -> Iterator[Chain]:
        if not len(rows):
            return
        self.model.dms.check_logits()
        for row, *end in zip(rows.tolist(), *self._budget(rows), strict=True):
            made = int(self.made[row])
            tokens = self.tokens[row, :made].tolist()
            finished = tokens[-1] == self.eos
            problem, chain = self.jobs[row]
            logs = (log[row, : made // self.config.stride + 1].tolist() for log in (self.live, self.reads))
            live, reads = ([*log, float(last)] for log, last in zip(logs, end, strict=True))
            tokens = tokens[:-1] if finished else tokens
            yield Chain(problem, chain, tokens, finished, len(self.prompts[problem]), live, reads)
        self.active[rows] = False
        self.cache.reset_rows(rows.to(self.model.device))

    def _shrink(self) -> None:
        """Nothing is queued: go on with the active rows alone."""
        rows = self.active.nonzero()[:, 0]
        self.cache.batch_select_indices(rows.to(self.model.device))
        self.jobs = [self.jobs[row] for row in rows.tolist()]
        for name in ("made", "position", "active", "tokens", "uniforms", "live", "reads"):
            setattr(self, name, getattr(self, name)[rows])
