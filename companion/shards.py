"""Parts of the chains, as on several cards, and the files that hold them beside each other."""

import glob
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Self


@dataclass(frozen=True)
class Shard:
    """One of ``count`` equal parts of the chains; the default is all of them."""

    index: int = 1  # 1 .. count
    count: int = 1

    def __post_init__(self) -> None:
        if not 1 <= self.index <= self.count:
            raise ValueError(f"shard {self}: must be I/N with I in 1..N, such as 1/4")

    def __str__(self) -> str:
        return f"{self.index}/{self.count}"

    @classmethod
    def parse(cls, text: str) -> Self:
        """Of "I/N".  Raises ValueError for anything else."""
        if not (found := re.fullmatch(r"(\d+)/(\d+)", text)):
            raise ValueError(f"shard {text}: must be I/N with I in 1..N, such as 1/4")
        return cls(*map(int, found.groups()))

    def file(self, whole: Path) -> Path:
        """Where this part of the records that ``whole`` names is written."""
        return whole if self.count == 1 else whole.with_name(f"{whole.stem}.{self.index}-of-{self.count}.jsonl")


WHOLE = Shard()


def record_files(whole: Path) -> list[Path]:
    """The files that hold the records that ``whole`` names: that one, and those of shards."""
    shards = whole.parent.glob(f"{glob.escape(whole.stem)}.*-of-*.jsonl")
    return [*[whole] * whole.exists(), *sorted(shards)]
