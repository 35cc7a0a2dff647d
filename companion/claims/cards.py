"""Claims and rules as cards for the book's pages: MyST Markdown, the verdict first.

Colours and borders are in book/_static/ledger.css; no verdict is told by its colour alone.
"""

from collections.abc import Iterator, Sequence

from companion.claims.ledger import NOT_TESTED, Claim
from companion.claims.protocols import Protocol, protocol

MOST = 6  # lines of numbers that are shown unfolded
TONES = {  # how a verdict begins → the class of its strip
    "agrees": "yes",
    "disagrees": "no",
    "loses": "no",
    "unresolved": "open",
    "no difference": "open",
    "no budgets": "open",
    NOT_TESTED: "untested",
}
DETAILS = {
    "outcome": "Outcome",
    "methods": "Methods",
    "budget": "Held equal",
    "problems": "Problems",
    "seeds": "Retrofit seeds",
    "analysis": "Analysis",
    "multiplicity": "Several intervals",
}


def show_claims(claims: Sequence[Claim], protocol: str | None = None):
    """A card for each claim, or for those that one protocol judges.  Returns an IPython Markdown."""
    from IPython.display import Markdown

    return Markdown("\n\n".join(claim_card(claim) for claim in claims if protocol in (None, claim.protocol)))


def show_rule(name: str):
    """A card for a protocol: what is asked, and what each verdict takes.  Returns an IPython Markdown."""
    from IPython.display import Markdown

    return Markdown(rule_card(protocol(name)))


def tally(claims: Sequence[Claim]) -> dict[str, int]:
    """How many claims have which kind of verdict."""
    found = [tone(claim.verdict) for claim in claims]
    words = {"yes": "agrees", "part": "in part", "no": "disagrees", "open": "unresolved", "untested": NOT_TESTED}
    return {word: found.count(kind) for kind, word in words.items()}


def tone(verdict: str) -> str:
    """yes, no, open or untested; part for one that holds in part."""
    found = next((name for begins, name in TONES.items() if verdict.startswith(begins)), "part")
    return "part" if found == "yes" and ("disagree" in verdict or ", not with" in verdict) else found


def claim_card(claim: Claim) -> str:
    """Verdict, claim and where it is computed; what was asked, the numbers, what was published; the rule, folded."""
    rule = protocol(claim.protocol) if claim.protocol else None
    where = "" if claim.where == "—" else f" {'Computed in' if rule else 'See'} {claim.where}."
    parts = [f"**{claim.claim}.**{where}", *([f"*Asked:* {rule.question}"] if rule else [])]
    if claim.measured != "—":
        parts += _numbers(claim.measured)
    parts.append(f"*Published:* {claim.published}.")
    parts += [] if claim.needs == "—" else [f"*A full test needs* {claim.needs}."]
    if rule:
        parts.append(_folded(f"Rule: {rule.name}.yaml, written {rule.written} the records", [rule.rule]))
    return _card(f"ledger-{tone(claim.verdict)}", claim.verdict[0].upper() + claim.verdict[1:], parts)


def rule_card(rule: Protocol) -> str:
    """Question, rule and what would count against DMS; the design, folded."""
    parts = [f"*Question.* {rule.question}", f"*Rule.* {rule.rule}", f"*Against it would count:* {rule.against}"]
    design = [f"*{title}.* {getattr(rule, name)}" for name, title in DETAILS.items()]
    if rule.detects:
        design.append(
            f"*Smallest difference that this design finds in four of five cases:* {rule.detects['points']} points."
        )
    head = f"Rule {rule.name}.yaml, written {rule.written} the records"
    return _card("ledger-rule", head, [*parts, _folded("The design", design)])


def _numbers(measured: str) -> Iterator[str]:
    """A line a number, what stands before its colon in bold; many are folded."""
    lines = [line.strip() for line in measured.split("; ")]
    bold = [f"**{label}:** {rest}" if rest else label for label, _, rest in (line.partition(": ") for line in lines)]
    shown = "\n".join(f"- {line}" for line in bold) if len(bold) > 1 else bold[0]
    yield shown if len(bold) <= MOST else _folded(f"{len(bold)} lines of numbers", [shown])


def _folded(title: str, parts: Sequence[str]) -> str:
    return "\n".join([f":::{{dropdown}} {title}", "\n\n".join(parts), ":::"])


def _card(kind: str, strip: str, parts: Sequence[str]) -> str:
    head = "\n".join(["::::{div} ledger-strip", strip, "::::"])
    return "\n\n".join([f":::::{{div}} ledger-card {kind}", head, *parts, ":::::"])
