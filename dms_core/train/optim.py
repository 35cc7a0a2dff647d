"""AdamW, or Muon for the matrices of the layers with AdamW for everything else, as one optimiser."""

from collections.abc import Sequence

import torch
from torch import nn

from dms_core.train.recipe import OPTIMIZERS


class Muon(torch.optim.Muon):
    """torch.optim.Muon (adjust_lr_fn "match_rms_adamw", Nesterov), in the weights' own precision on a CPU.

    torch orthogonalises in bf16, which costs a CPU without instructions for it about fifteen times as much as fp32.
    """

    @torch.no_grad()
    def step(self, closure=None):
        if self.param_groups[0]["params"][0].device.type != "cpu":
            return super().step(closure)
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                if "momentum_buffer" not in self.state[p]:
                    self.state[p]["momentum_buffer"] = torch.zeros_like(p.grad)
                buffer = self.state[p]["momentum_buffer"].lerp_(p.grad, 1 - group["momentum"])
                update = p.grad.lerp(buffer, group["momentum"])
                update = orthogonalise(update, group["ns_coefficients"], group["ns_steps"])
                p.mul_(1 - group["lr"] * group["weight_decay"])
                p.add_(update, alpha=-group["lr"] * (0.2 * max(p.shape) ** 0.5))


def orthogonalise(x: torch.Tensor, coefficients: tuple[float, float, float], steps: int) -> torch.Tensor:
    """Newton-Schulz: the matrix x with its singular values brought to about 1, in x's dtype."""
    a, b, c = coefficients
    tall = x.shape[0] > x.shape[1]
    x = (x.T if tall else x) / x.norm().clamp(min=1e-7)  # no singular value above 1
    for _ in range(steps):
        gram = x @ x.T
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.T if tall else x


class MuonAdamW(torch.optim.Optimizer):
    """Groups with ``muon`` True are stepped by torch.optim.Muon, the others by torch.optim.AdamW.

    Muon's update is scaled to AdamW's root mean square, so one learning rate and schedule serves both.
    """

    def __init__(self, groups: list[dict], lr: float, betas: tuple[float, float], weight_decay: float) -> None:
        super().__init__(groups, {"lr": lr, "weight_decay": weight_decay, "muon": False})
        plain = [group for group in self.param_groups if not group["muon"]]
        matrices = [group for group in self.param_groups if group["muon"]]
        muon = Muon(matrices, lr=lr, weight_decay=weight_decay, adjust_lr_fn="match_rms_adamw")
        adamw = [torch.optim.AdamW(plain, lr=lr, betas=betas, weight_decay=weight_decay)] if plain else []
        self.parts: list[torch.optim.Optimizer] = [*adamw, muon]
        self._share_groups()

    def _share_groups(self) -> None:
        """Schedulers write to our groups: the parts read the very same dictionaries."""
        self.param_groups = [group for part in self.parts for group in part.param_groups]

    @torch.no_grad()
    def step(self, closure=None):
        for part in self.parts:
            part.step()

    def state_dict(self) -> dict:
        return {"parts": [part.state_dict() for part in self.parts]}

    def load_state_dict(self, state: dict) -> None:
        for part, saved in zip(self.parts, state["parts"], strict=True):
            part.load_state_dict(saved)
        self._share_groups()


class LentRows:
    """Rows of larger parameters, which an optimiser steps as parameters of their own (``leaves``).

    Before its step they lend the leaves their values and gradients, which are then zero in the larger parameter; after
    it they take the values back.  Between steps leaves are stale and the larger parameter holds the values, so saving,
    loading and clipping work unchanged.
    """

    def __init__(self, rows: Sequence[tuple[nn.Parameter, torch.Tensor]]) -> None:
        """rows: parameters, each with indices of rows, (R,)."""
        self.lent = [(p, index, nn.Parameter(p.detach()[index])) for p, index in rows]
        self.leaves = [leaf for _, _, leaf in self.lent]

    def around(self, optimizer: torch.optim.Optimizer) -> None:
        optimizer.register_step_pre_hook(self._lend)
        optimizer.register_step_post_hook(self._take_back)

    def _lend(self, *_) -> None:
        for p, index, leaf in self.lent:
            leaf.data, leaf.grad = p.detach()[index], None if p.grad is None else p.grad[index]
            if p.grad is not None:
                p.grad[index] = 0

    @torch.no_grad()
    def _take_back(self, *_) -> None:
        for p, index, leaf in self.lent:
            p[index] = leaf


def make_optimizer(
    named: list[tuple[str, nn.Parameter]],
    kind: str,
    lr: float,
    weight_decay: float,
    gate_lr=None,
    betas=(0.9, 0.95),
    rows: Sequence[tuple[nn.Parameter, torch.Tensor]] = (),
) -> torch.optim.Optimizer:
    """An optimiser for the parameters that train.  Gates (``.dms_gate.``) get AdamW, no decay and ``gate_lr``, or
    ``lr`` if that is None.

    rows: parameters among these and their rows that serve a gate (``DMS.gate_rows``).  With a ``gate_lr`` they are
    stepped as gates, without one as the rest of their matrix.  The parameters must be whole, and where they will be.
    Without a matrix for Muon it is torch's own AdamW, which FSDP can shard and save.
    """
    if kind not in OPTIMIZERS:
        raise ValueError(f"optimizer {kind!r}: must be one of {OPTIMIZERS}")
    lent = LentRows([] if gate_lr is None else rows)
    gates, matrices, rest = [*lent.leaves], [], []
    for name, p in named:
        if ".dms_gate." in name:
            gates.append(p)
        elif kind == "muon" and p.ndim == 2 and "embed" not in name and "lm_head" not in name:
            matrices.append(p)
        else:
            rest.append(p)
    groups: list[dict] = [
        {"params": rest},
        {"params": gates, "lr": lr if gate_lr is None else gate_lr, "weight_decay": 0.0},
        {"params": matrices, "muon": True},
    ]
    groups = [group for group in groups if group["params"]]
    if matrices:
        optimizer: torch.optim.Optimizer = MuonAdamW(groups, lr, tuple(betas), weight_decay)
    else:
        optimizer = torch.optim.AdamW(groups, lr=lr, betas=tuple(betas), weight_decay=weight_decay)
    lent.around(optimizer)
    return optimizer
