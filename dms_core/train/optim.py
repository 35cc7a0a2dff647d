"""AdamW, or Muon for the matrices of the layers with AdamW for everything else, as one optimiser."""

import torch
from torch import nn

from dms_core.train.recipe import OPTIMIZERS


class MuonAdamW(torch.optim.Optimizer):
    """Groups with ``muon`` True are stepped by torch.optim.Muon, the others by torch.optim.AdamW.

    Muon's update is scaled to AdamW's root mean square, so one learning rate and schedule serves both.
    """

    def __init__(self, groups: list[dict], lr: float, betas: tuple[float, float], weight_decay: float) -> None:
        super().__init__(groups, {"lr": lr, "weight_decay": weight_decay, "muon": False})
        plain = [group for group in self.param_groups if not group["muon"]]
        matrices = [group for group in self.param_groups if group["muon"]]
        muon = torch.optim.Muon(matrices, lr=lr, weight_decay=weight_decay, adjust_lr_fn="match_rms_adamw")
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


def make_optimizer(
    named: list[tuple[str, nn.Parameter]], kind: str, lr: float, weight_decay: float, gate_lr=None, betas=(0.9, 0.95)
) -> torch.optim.Optimizer:
    """An optimiser for the parameters that train.  Gates (``.dms_gate.``) get AdamW, no decay and ``gate_lr``, or
    ``lr`` if that is None.

    Without a matrix for Muon it is torch's own AdamW, which FSDP can shard and save.
    """
    if kind not in OPTIMIZERS:
        raise ValueError(f"optimizer {kind!r}: must be one of {OPTIMIZERS}")
    gates, matrices, rest = [], [], []
    for name, p in named:
        if ".dms_gate." in name:
            gates.append(p)
        elif kind == "muon" and p.ndim == 2 and "embed" not in name and "lm_head" not in name:
            matrices.append(p)
        else:
            rest.append(p)
    groups = [
        {"params": rest},
        {"params": gates, "lr": lr if gate_lr is None else gate_lr, "weight_decay": 0.0},
        {"params": matrices, "muon": True},
    ]
    groups = [group for group in groups if group["params"]]
    if not matrices:
        return torch.optim.AdamW(groups, lr=lr, betas=tuple(betas), weight_decay=weight_decay)
    return MuonAdamW(groups, lr, tuple(betas), weight_decay)
