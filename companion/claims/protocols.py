"""The rules by which claims are judged: ``data/protocols``, each committed before the records that it governs.

A protocol says what is asked, what is measured, how it is analysed, the smallest difference that the design can detect,
and what would count against DMS.  Where records were there before the rule, it says so (``written: after``).
"""

from dataclasses import dataclass, field, fields
from functools import cache

import yaml

from companion.paths import PROTOCOLS

WRITTEN = ("before", "after")  # the records that it governs


@dataclass(frozen=True)
class Protocol:
    """One file; texts are Markdown in one line."""

    name: str
    question: str
    written: str  # before or after the records
    date: str
    outcome: str  # the primary one
    methods: str
    budget: str  # what is held equal
    problems: str  # and chains
    seeds: str  # of the retrofit
    analysis: str
    rule: str  # what each verdict takes
    against: str  # what would count against DMS
    multiplicity: str
    thresholds: dict[str, float] = field(default_factory=dict)  # numbers of the rule, which the ledger reads
    detects: dict = field(default_factory=dict)  # "points", and the arguments of budgets.detectable that give them


@cache
def protocols() -> dict[str, Protocol]:
    """All by name, the file's.  Raises ValueError for a file that lacks a field or has another."""
    return {file.stem: _read(file) for file in sorted(PROTOCOLS.glob("*.yaml"))}


def protocol(name: str) -> Protocol:
    """Raises ValueError for an unknown name."""
    if name not in protocols():
        raise ValueError(f"protocol {name!r}: must be one of {', '.join(protocols())}")
    return protocols()[name]


def _read(file) -> Protocol:
    entry = yaml.safe_load(file.read_text(encoding="utf-8"))
    known = {f.name for f in fields(Protocol)} - {"name"}
    needed = known - {"thresholds", "detects"}
    if wrong := sorted((needed - set(entry)) | (set(entry) - known)):
        raise ValueError(f"{file}: {', '.join(wrong)}: must have {', '.join(sorted(needed))} and nothing unknown")
    if entry["written"] not in WRITTEN:
        raise ValueError(f"{file}: written {entry['written']!r}: must be one of {', '.join(WRITTEN)}")
    texts = {
        name: " ".join(str(value).split()) for name, value in entry.items() if name not in ("thresholds", "detects")
    }
    return Protocol(file.stem, **{**entry, **texts})
