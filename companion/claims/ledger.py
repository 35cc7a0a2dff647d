"""The ledger: each claim of the paper, where the book tests it, what came out, what was published, and a verdict.

The claims stand in ``claims.yaml``, the rules of their verdicts in ``data/protocols``, and ``measures`` applies them.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.resources import files

import yaml

from companion.claims import published, wording
from companion.claims.evidence import Evidence, gather
from companion.claims.measures import MEASURES
from companion.claims.protocols import protocol

__all__ = ["Claim", "Evidence", "gather", "make_ledger", "markdown"]

NOT_TESTED = "not tested"
COLUMNS = {  # of the table, by field
    "claim": "claim of the paper",
    "where": "where",
    "measured": "this book",
    "published": "published",
    "verdict": "verdict",
    "rule": "rule",
    "needs": "the rest needs",
}


@dataclass(frozen=True)
class Claim:
    """An entry of the ledger; every field is text, ``where`` a MyST reference into the book."""

    claim: str
    where: str
    measured: str
    published: str
    verdict: str
    rule: str  # of the verdict: the protocol's name, whether it was written before the records, and its words
    needs: str
    protocol: str = ""  # its name; none where nothing was tested


def make_ledger(evidence: Evidence) -> list[Claim]:
    """Every claim, in the order of the paper."""
    entries = yaml.safe_load((files("companion.claims") / "claims.yaml").read_text(encoding="utf-8"))
    return [_judge(evidence, **entry) for entry in entries]


def markdown(claims: Sequence[Claim]) -> str:
    """The ledger as a Markdown table."""
    return wording.table(tuple(COLUMNS.values()), [[getattr(claim, name) for name in COLUMNS] for claim in claims])


def _judge(
    evidence: Evidence, measure: Sequence[str] = (), untested: dict | None = None, judged_by: str = "", **entry
) -> Claim:
    """The row of one entry of claims.yaml."""
    rule = protocol(judged_by) if measure else None
    found = {f.__name__: f for f in MEASURES}[measure[0]](evidence, rule, *measure[1:]) if measure else None
    texts = [entry["published"]] if isinstance(entry["published"], str) else map(_told, entry["published"])
    entry |= {"published": "; ".join(texts)}
    if found is None:
        return Claim(**{"measured": "—", "verdict": NOT_TESTED, "rule": "—"} | entry | (untested or {}))
    words = f"{rule.name}.yaml, written {rule.written} the records: {rule.rule}"
    return Claim(measured=found[0], verdict=found[1], rule=words, protocol=rule.name, **entry)


def _told(part: dict) -> str:
    """A published text with its numbers filled in, as claims.yaml tells."""
    source = part["source"]
    if source == "accuracies":
        rows, value = published.accuracies(), "difference"
    else:
        rows = published.table(source) if isinstance(source, int) else published.read(source)
        value = part.get("value", "value")
    rows = rows.query(part["query"])
    means = rows.groupby(rows[part["by"]].astype(str).agg(" ".join, axis=1))[value].mean().to_dict()
    text = part["text"].format_map(means | {"min": rows[value].min(), "max": rows[value].max(), "table": source})
    return re.sub(r"(?<=\s)-(?=\d)", "−", text)
