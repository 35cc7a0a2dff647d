"""What is compared: a model with a cache, by the name that it has in every table and figure."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Method:
    """What is measured: its name in every table and figure, and its target compression ratio."""

    name: str  # vanilla, dms, dms-immediate, tova, ...
    cr: float
    seed: int = 0  # of its retrofit, counted from the run's

    def __str__(self) -> str:
        return f"{self.name}-cr{self.cr:g}{seed_suffix(self.seed)}"


def seed_suffix(seed: int) -> str:
    """What names of files and stages end with: nothing for the first seed of a run."""
    return f"-seed{seed}" if seed else ""
