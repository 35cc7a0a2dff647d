"""The retrofit's losses (paper section 3.2): L = L_KD + L_aux, both with weight 1 unless a recipe says otherwise.

L_KD is the divergence between student and frozen teacher at temperature 1, averaged over labelled tokens;
L_aux = max(alpha* - mean over layers, heads and valid tokens of the hard decisions, 0), per row, then the mean.
Both means run over the global batch of an optimiser step, however processes and accumulation cut it (``Totals``): every
labelled token, and every row, weighs the same.
"""

from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from dms_core.probe import decoder_of
from dms_core.train.heads import logits_of
from dms_core.train.lora import without_lora
from dms_core.train.recipe import DIRECTIONS


class Totals(NamedTuple):
    """What the global batch of a step holds: labelled tokens, rows, and tokens that are not padding."""

    labelled: float
    rows: float
    valid: float


def token_divergence(student: Tensor, teacher: Tensor, direction: str) -> Tensor:
    """KL in nats per token from logits (N, V): forward is KL(teacher || student), reverse KL(student || teacher)."""
    s, t = F.log_softmax(student.float(), -1), F.log_softmax(teacher.float(), -1)
    first, second = (t, s) if direction == "forward" else (s, t)
    return (first.exp() * (first - second)).sum(-1)


def chunked_loss(hidden: Tensor, teacher_hidden: Tensor, targets: Tensor, heads, direction: str, chunk: int) -> Tensor:
    """Mean loss per token without ever holding (N, V) logits for more than ``chunk`` tokens.

    hidden, teacher_hidden (N, d); targets (N,) next tokens, used by direction "lm"; heads: what makes logits of hidden
    states, the student's and the teacher's.  Logits are computed again in the backward pass.
    """

    def part(h: Tensor, t: Tensor, y: Tensor) -> Tensor:
        if direction == "lm":
            return F.cross_entropy(heads[0](h).float(), y, reduction="sum")
        with torch.no_grad():
            teacher_logits = heads[1](t)
        return token_divergence(heads[0](h), teacher_logits, direction).sum()

    pieces = zip(hidden.split(chunk), teacher_hidden.split(chunk), targets.split(chunk), strict=True)
    if len(hidden) <= chunk:
        return part(hidden, teacher_hidden, targets) / max(len(hidden), 1)
    return sum(checkpoint(part, *piece, use_reentrant=False) for piece in pieces) / len(hidden)


def compression_loss(evicted: list[Tensor], valid: Tensor, target: float | Tensor) -> tuple[Tensor, Tensor]:
    """(L_aux, evicted fraction of all valid tokens).  evicted: per layer (B, H, T); valid (B, T)."""
    decisions = torch.stack([e.float().mean(1) for e in evicted]).mean(0)  # (B, T), mean over layers and heads
    counted = (decisions * valid).sum(1)
    fraction = counted / valid.sum(1).clamp_min(1)
    return (target - fraction).clamp_min(0).mean(), (counted.sum() / valid.sum()).detach()


def _second_names(module: nn.Module) -> list[str] | None:
    """Names under which the state dict repeats a tensor that it already holds: tied weights."""
    once = {id(tensor): name for name, tensor in reversed(list(module.state_dict(keep_vars=True).items()))}
    return sorted(set(module.state_dict()) - set(once.values())) or None


class Distiller(nn.Module):
    """Student (with gates) and teacher as one module, so that a Trainer can wrap, shard and step it.

    ``teacher`` None: the student's own weights without adapters and with eviction off, for frozen bases.
    """

    def __init__(
        self, student: PreTrainedModel, teacher: PreTrainedModel | None, direction="forward", chunk=4096, aux_weight=1.0
    ) -> None:
        super().__init__()
        if direction not in DIRECTIONS:
            raise ValueError(f"direction {direction!r}: must be one of {DIRECTIONS}")
        self.student, self.config = student, student.config
        self.direction, self.chunk, self.aux_weight = direction, chunk, aux_weight
        self._keys_to_ignore_on_save = _second_names(self)  # the Trainer's name for it; it calls tie_weights() then
        object.__setattr__(self, "teacher", teacher)  # not a submodule: neither trained, saved nor moved
        if teacher is not None:
            teacher.requires_grad_(False).eval()

    def tie_weights(self) -> None:
        self.student.tie_weights()

    def forward(
        self, input_ids: Tensor, labels: Tensor, alpha_target: float = 0.0, totals: Totals | None = None, **inputs
    ) -> dict:
        """input_ids, labels (B, T), -100 where a token is not to be predicted.  Returns the loss and its parts.

        With ``totals`` they are this batch's share in the means of a step: summed over the step's batches, the means.
        """
        inputs = {"input_ids": input_ids, "use_cache": False, **inputs}
        teacher_hidden = None if self.direction == "lm" else self._teacher_hidden(inputs)
        hidden = decoder_of(self.student)(**inputs).last_hidden_state
        teacher_hidden = hidden.detach() if teacher_hidden is None else teacher_hidden
        step = self.student.dms.step
        targets = labels[:, 1:]
        wanted = targets != -100
        heads = tuple(partial(logits_of, model) for model in (self.student, self.teacher or self.student))
        kd = chunked_loss(
            hidden[:, :-1][wanted], teacher_hidden[:, :-1][wanted], targets[wanted], heads, self.direction, self.chunk
        )
        aux, evicted = compression_loss(list(step.evicted.values()), step.valid, alpha_target)
        if totals is not None:
            kd = kd * (wanted.sum() / max(totals.labelled, 1))
            aux, evicted = aux * (len(labels) / totals.rows), evicted * (step.valid.sum() / totals.valid)
        return {"loss": kd + self.aux_weight * aux, "kd": kd.detach(), "aux": aux.detach(), "evicted": evicted}

    @torch.no_grad()
    def _teacher_hidden(self, inputs: dict) -> Tensor:
        # Padding is behind all that counts: a causal model needs no mask for it and is faster without one, and
        # transformers keeps packed documents apart by their positions only where there is none.
        inputs = {name: x for name, x in inputs.items() if name != "attention_mask"}
        if self.teacher is not None:
            if self.teacher.device != inputs["input_ids"].device:  # the Trainer moves only the student
                self.teacher.to(inputs["input_ids"].device)
            return decoder_of(self.teacher)(**inputs).last_hidden_state
        with self.student.dms.disabled(), without_lora(self.student):
            return decoder_of(self.student)(**inputs).last_hidden_state
