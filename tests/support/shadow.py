"""A stand-in accelerator: device "shadow", whose tensors are wrapped CPU tensors, and which counts waits for it.

Importing this module registers the device.  As on CUDA, an operation refuses tensors of two devices, but for a number
(a CPU tensor without dimensions) and for indices, which are copied; a CPU generator cannot draw on it; and NumPy cannot
read it.  Results are the CPU's, since the CPU computes them.

    with waits() as seen:
        model(ids.to("shadow"))
    seen.kinds  # {"item": 2, ...}: what would have made the host wait for a CUDA device, or the device for the host
"""

import contextlib
import sys
import threading
from collections import Counter
from dataclasses import dataclass, field
from functools import cache, partial
from pathlib import Path

import torch
from torch import library
from torch.utils.backend_registration import (
    _DummyBackendModule,
    _DummyPrivateUse1Hook,
    _setup_privateuseone_for_python_backend,
)

DEVICE = torch.device("cpu")  # replaced below, once the name is known
ROOT = Path(__file__).resolve().parents[2]
OURS = tuple(str(ROOT / part) for part in ("dms_core", "kernels", "companion"))
aten = torch.ops.aten
INDEXING = {"index", "index_put", "index_put_", "_index_put_impl_", "_unsafe_index", "_unsafe_index_put"}
COPIES = {"copy_", "_to_copy"}
FACTORIES = (aten.arange.default, aten.arange.start, aten.arange.start_step, aten.linspace.default)  # else: out=
WAITING = {  # operations whose result has a size, or is a Python value, that only the device knows
    "_local_scalar_dense": "item",
    "equal": "item",
    "nonzero": "nonzero",
    "masked_select": "boolean index",
    "_unique": "unique",
    "_unique2": "unique",
    "unique_dim": "unique",
    "unique_consecutive": "unique",
    "unique_dim_consecutive": "unique",
    "bincount": "bincount",
}


@dataclass
class Waits:
    """What the host waited for, in order: pairs of a kind and the line of the repository that caused it."""

    seen: list[tuple[str, str]] = field(default_factory=list)

    @property
    def kinds(self) -> Counter:
        return Counter(kind for kind, _ in self.seen)

    @property
    def ours(self) -> list[tuple[str, str]]:
        """Those that a line of this repository caused, not one of transformers."""
        return [wait for wait in self.seen if wait[1]]

    def __len__(self) -> int:
        return len(self.seen)

    def __str__(self) -> str:
        return "\n".join(f"{count} x {kind} at {line or 'transformers'}" for (kind, line), count in self.lines())

    def lines(self) -> list[tuple[tuple[str, str], int]]:
        return Counter(self.seen).most_common()


_counters: list[Waits] = []
_lock = threading.Lock()


@contextlib.contextmanager
def waits():
    """Counts, inside, what makes the host wait for the device, in this thread and in autograd's."""
    counter = Waits()
    _counters.append(counter)
    try:
        yield counter
    finally:
        _counters.remove(counter)


def _wait(kind: str) -> None:
    if _counters:
        with _lock:
            line = _source_line()
            for counter in _counters:
                counter.seen.append((kind, line))


def _source_line() -> str:
    """The innermost line of this repository's packages, or "" where transformers or a test is at work."""
    frame = sys._getframe(2)
    while frame is not None:
        file = frame.f_code.co_filename
        if file.startswith(OURS):
            return f"{Path(file).relative_to(ROOT)}:{frame.f_lineno}"
        if "/transformers/" in file and "/models/" not in file:
            return ""
        frame = frame.f_back
    return ""


class Shadow(torch.Tensor):
    """A tensor on the device: ``held`` is the CPU tensor that stands for its memory."""

    @staticmethod
    def __new__(cls, held: torch.Tensor):
        return torch.Tensor._make_wrapper_subclass(
            cls, held.shape, strides=held.stride(), storage_offset=held.storage_offset(), dtype=held.dtype,
            device=DEVICE, requires_grad=False,
        )  # fmt: skip

    def __init__(self, held: torch.Tensor) -> None:
        self.held = held

    def __repr__(self, **_) -> str:
        return f"Shadow({self.held!r})"

    def tolist(self):
        return self.cpu().tolist()

    def numpy(self, **_):
        raise TypeError("can't convert a shadow tensor to numpy: use Tensor.cpu() first")

    def __array__(self, *_, **__):
        return self.numpy()

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **(kwargs or {}))

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        if _composite(func):  # in inference mode these arrive whole, and what they wait for would go unseen
            return func._op_dk(torch._C.DispatchKey.CompositeImplicitAutograd, *args, **(kwargs or {}))
        return _run(func, args, kwargs or {})


@cache
def _composite(func) -> bool:
    return torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), "CompositeImplicitAutograd")


def _run(func, args, kwargs):
    """Run ``func`` on what the arguments wrap; its results are on the device if it was named, or else an argument's."""
    name, outer, foreign = func.overloadpacket.__name__, {}, []

    def bare(x):
        if isinstance(x, Shadow):
            outer[id(x.held)] = x
            return x.held
        if isinstance(x, (list, tuple)):
            return [bare(y) for y in x]
        if isinstance(x, torch.Tensor) and x.ndim:
            foreign.append(x)
        elif isinstance(x, torch.Generator):
            raise RuntimeError(f"{name}: expected a 'shadow' device type for generator but found '{x.device.type}'")
        return torch.device("cpu") if isinstance(x, torch.device) and x.type == DEVICE.type else x

    inner_args, inner_kwargs = [bare(x) for x in args], {key: bare(x) for key, x in kwargs.items()}
    device = kwargs.get("device")
    here = bool(outer) if device is None else torch.device(device).type == DEVICE.type
    if outer and name not in COPIES:
        _check(name, foreign, args)
    _note(name, args, kwargs, here)
    result = func(*inner_args, **inner_kwargs)
    if name == "copy_" and not isinstance(args[0], Shadow):
        return args[0]

    def dress(x):
        if isinstance(x, (list, tuple)):
            return type(x)(map(dress, x))
        if not isinstance(x, torch.Tensor) or not here:
            return x
        same = outer.get(id(x))
        if same is not None and same.shape != x.shape:
            raise NotImplementedError(f"{name}: the stand-in cannot resize a tensor in place")
        return Shadow(x) if same is None else same

    if _view(func) and outer and not any(x.is_inference() for x in outer.values()):
        with torch.inference_mode(False):  # a view is no inference tensor where its base is none
            return dress(result)
    return dress(result)


@cache
def _view(func) -> bool:
    return any(value.alias_info and not value.alias_info.is_write for value in func._schema.returns)


def _check(name: str, foreign: list[torch.Tensor], args) -> None:
    """Raises RuntimeError for tensors of another device among those of this one, as CUDA does; indices may be."""
    indices = [id(x) for x in args[1] if x is not None] if name in INDEXING else []
    for x in foreign:
        if id(x) not in indices:
            raise RuntimeError(
                f"{name}: expected all tensors to be on the same device, but found shadow:0 and {x.device}, "
                f"shape {tuple(x.shape)}, at {_source_line()}"
            )


def _note(name: str, args, kwargs, here: bool) -> None:
    """Count what would make the host wait."""
    if name in WAITING:
        _wait(WAITING[name])
    elif name == "repeat_interleave" and kwargs.get("output_size") is None:
        _wait("repeat_interleave")
    elif name in COPIES:
        target, source = (args[0], args[1]) if name == "copy_" else (None, args[0])
        to = here if target is None else isinstance(target, Shadow)
        if isinstance(source, Shadow) != to and not (name == "copy_" and source.ndim == 0 and to):
            waits_not = kwargs.get("non_blocking") or (name == "copy_" and len(args) > 2 and args[2])
            if not (to and waits_not):
                _wait("to the device" if to else "to the host")
    elif name in INDEXING:
        value = args[2] if len(args) > 2 else None
        for index in args[1]:
            if index is None:
                continue
            if not isinstance(index, Shadow):
                _wait("to the device")
            if index.dtype in (torch.bool, torch.uint8) and (value is None or value.numel() != 1):
                _wait("boolean index")


class _Module(_DummyBackendModule):
    """``torch.shadow``."""

    def is_available(self) -> bool:
        return False  # so that nothing chooses it by itself

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.bfloat16, torch.float16]


class _Hook(_DummyPrivateUse1Hook):
    def is_available(self) -> bool:
        return False


def _register() -> tuple[library.Library, ...]:
    _setup_privateuseone_for_python_backend("shadow", _Module(), _Hook())
    fallback, copies = library.Library("_", "IMPL"), library.Library("aten", "IMPL")
    fallback.fallback(lambda op, *args, **kwargs: _run(op, args, kwargs), "PrivateUse1")
    fallback.fallback(library.fallthrough_kernel, "AutocastPrivateUse1")  # autocast changes nothing
    copies.impl("_copy_from", _copy_from, "PrivateUse1")  # how torch.tensor() fills a tensor there
    for op in FACTORIES:
        copies.impl(f"{op._schema.name}.{op._overloadname}".removesuffix(".default"), partial(_make, op), "PrivateUse1")
    return fallback, copies


def _make(op, *args, **kwargs):
    return _run(op, args, kwargs)


def _copy_from(source, target, non_blocking=False):
    if isinstance(source, Shadow) != isinstance(target, Shadow) and not non_blocking:
        _wait("to the host" if isinstance(source, Shadow) else "to the device")
    copied, into = (x.held if isinstance(x, Shadow) else x for x in (source, target))
    into.copy_(copied)
    return target


_libraries = _register()
DEVICE = torch.device("shadow", 0)


def moved(model: torch.nn.Module) -> torch.nn.Module:
    """The model with its weights on the stand-in; what was tied stays tied."""
    model.to(DEVICE)
    if hasattr(model, "tie_weights"):
        model.tie_weights()
    return model
