"""One frozen configuration of the method."""

from dataclasses import asdict, dataclass, fields


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
        if not isinstance(self.window, int) or self.window < 0:
            raise ValueError(f"window {self.window!r}: must be an integer >= 0")
        for name in ("scale", "temperature"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} {getattr(self, name)}: must be > 0")

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


def target_fraction(cr: float) -> float:
    """The share of tokens to evict at compression ratio ``cr``: 1 - 1 / cr.  Raises ValueError below 1."""
    if not cr >= 1:
        raise ValueError(f"compression ratio {cr}: must be >= 1")
    return 1.0 - 1.0 / cr
