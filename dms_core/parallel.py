"""One model over several processes: transformers' tensor parallelism, seen from the KV heads.

Under ``torchrun``, ``load_model(name, **tensor_parallel())`` gives each process its share of every projection, hence of
the query and KV heads of each layer.  Gates, cache rows and evictions belong to one KV head, so they need no word from
the others; what spans heads goes through a ``Split``: means of budgets, scores that heads share, and the sampled token.
"""

import os
from dataclasses import dataclass
from typing import Any

import torch.distributed as dist
from torch import Tensor

KEY_PROJECTIONS = ("k_proj", "qkv_proj", "query_key_value")  # as transformers names them


@dataclass(frozen=True)
class Split:
    """Which part of a model's KV heads this process has.  The default: all of them, and no other process."""

    rank: int = 0
    size: int = 1  # processes that hold one model together
    group: dist.ProcessGroup | None = None
    parts: int = 1  # parts of the KV heads: size, or 1 where the plan gathers them on every process

    def take(self, x: Tensor) -> Tensor:
        """Of x (B, H, ...) the heads here: (B, H / parts, ...)."""
        return x if self.parts == 1 else x.chunk(self.parts, 1)[self.rank]

    def sum(self, x: Tensor) -> Tensor:
        """Sum over the parts of what each process found for its heads."""
        if self.parts > 1:
            dist.all_reduce(x := x.contiguous(), group=self.group)
        return x

    def mean(self, counts: Tensor) -> Tensor:
        """Means over layers and all heads of integers (layers, B, H): (B,), from exact sums."""
        layers, _, heads = counts.shape
        return self.sum(counts.sum((0, 2))).float() / (layers * heads * self.parts)

    def agree(self, x: Tensor) -> Tensor:
        """The first process's ``x``: rounding may differ between processes, which must not diverge."""
        if self.size > 1:
            dist.broadcast(x := x.contiguous(), group=self.group, group_src=0)
        return x

    def share(self, value: Any) -> Any:
        """The first process's Python value."""
        if self.size == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, group=self.group, group_src=0)
        return box[0]


WHOLE = Split()


def split_of(model) -> Split:
    """How ``model`` was loaded: over the processes of a tensor-parallel group, or whole."""
    mesh, size = getattr(model, "_device_mesh", None), getattr(model, "tp_size", None)
    if mesh is None or not size or size == 1:
        return WHOLE
    mesh = mesh["tp"] if "tp" in (mesh.mesh_dim_names or ()) else mesh
    plan = (model.tp_plan or {}).items()
    split = any(style == "colwise" and name.rsplit(".", 1)[-1] in KEY_PROJECTIONS for name, style in plan)
    return Split(mesh.get_local_rank(), size, mesh.get_group(), size if split else 1)


def tensor_parallel() -> dict:
    """Options of ``load_model`` and ``load_base`` that split the model over the processes of ``torchrun``.

    Empty where there is one process.  NCCL on the cards of this machine, gloo where there are none.
    """
    if int(os.environ.get("WORLD_SIZE", 1)) == 1:
        return {}
    from transformers.distributed import DistributedConfig

    return {"distributed_config": DistributedConfig(tp_plan="auto")}
