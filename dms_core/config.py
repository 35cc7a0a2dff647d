"""One frozen configuration of the method."""

import math
import numbers
from dataclasses import asdict, dataclass, fields
from typing import Any


@dataclass(frozen=True)
class DMSConfig:
    """How a model decides what to evict, and when the eviction takes effect (paper sections 3.1-3.2, appendix C).

    Raises ValueError for a value that its field may not have.

    >>> DMSConfig(window=16, eviction="immediate").lag
    16
    """

    gate: str = "adapter"  # "adapter": RMSNorm + linear on the residual stream; "neuron": one query neuron
    window: int = 256  # tokens for which a decision is delayed; the cache holds window + 1 recent tokens
    scale: float = 100.0  # s in z = s * x - offset
    offset: float = 5.0  # b0: eviction is off at the start
    temperature: float = 0.1  # tau of the Gumbel-sigmoid
    granularity: str = "head"  # "head", or "layer": all heads of a layer follow the first
    eviction: str = "delayed"  # "delayed": token j + 1 decides about j; "immediate": token j + window does
    neuron: int = -1  # which neuron of a group's first query head, for gate "neuron"

    def __post_init__(self) -> None:
        for name, allowed in (
            ("gate", ("adapter", "neuron")),
            ("granularity", ("head", "layer")),
            ("eviction", ("delayed", "immediate")),
        ):
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} {getattr(self, name)!r}: must be one of {allowed}")
        check_numbers(self, "window", whole=True, least=0)
        check_numbers(self, "neuron", whole=True)
        check_numbers(self, "scale", "temperature", above=0)
        check_numbers(self, "offset")

    @property
    def lag(self) -> int:
        """The decision about token j is read from token j + lag."""
        return 1 if self.eviction == "delayed" else self.window

    def to_dict(self) -> dict:
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict) -> "DMSConfig":
        known = {field.name for field in fields(cls)}
        if unknown := set(values) - known:
            raise ValueError(f"unknown DMS settings {sorted(unknown)}: allowed are {sorted(known)}")
        return cls(**values)


def check_numbers(
    config: Any, *names: str, whole: bool = False, least: float = -math.inf, above: float = -math.inf
) -> None:
    """Raises ValueError for a field that is no finite number (``whole``: no integer) or out of its bounds.

    A field that is None by default may be None.
    """
    kind, words = (numbers.Integral, "an integer") if whole else (numbers.Real, "a finite number")
    bound = f" >= {least}" if least > -math.inf else f" > {above}" if above > -math.inf else ""
    optional = {field.name for field in fields(config) if field.default is None}
    for name in names:
        value = getattr(config, name)
        if value is None and name in optional:
            continue
        if not isinstance(value, kind) or isinstance(value, bool) or not math.isfinite(value):
            raise ValueError(f"{name} {value!r}: must be {words}{bound}")
        if not (float(value) >= least and float(value) > above):
            raise ValueError(f"{name} {value}: must be{bound}")


def target_fraction(cr: float) -> float:
    """The share of tokens to evict at compression ratio ``cr``: 1 - 1 / cr.  Raises ValueError below 1."""
    if not cr >= 1:
        raise ValueError(f"compression ratio {cr}: must be >= 1")
    return 1.0 - 1.0 / cr
