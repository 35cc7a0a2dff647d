"""Measured numbers as words and tables, so that the book's sentences follow from what was computed."""

from collections.abc import Iterable, Sequence


def signed(value: float | None, digits: int = 1) -> str:
    """A number with its sign, minus as "−"; the paper's NA for None.  What is below zero and rounds to it is −0.0."""
    return "NA" if value is None else f"{round(value, 9) + 0.0:+.{digits}f}".replace("-", "−")


def points(value: float, low: float, high: float) -> str:
    """A number of percentage points with its 95 % interval, such as "+1.3 points (95 % interval −0.4 to +3.0)"."""
    return f"{signed(value)} points (95 % interval {signed(low)} to {signed(high)})"


def interval(value: float | None, low: float | None, high: float | None) -> str:
    """A number of points with its 95 % interval, such as "+1.3 [−0.4, +3.0]"."""
    return "NA" if value is None else f"{signed(value)} [{signed(low)}, {signed(high)}]"


def verdict(low: float, high: float, problems: int, better: str = "higher", worse: str = "lower") -> str:
    """What the 95 % interval of a difference allows one to say."""
    if low > 0:
        return better
    return worse if high < 0 else f"no difference that {problems} problems can resolve"


def margin(rows: Sequence[dict], a: str, b: str, axis: str, scale: str, task: str | None = None) -> dict:
    """The margin of ``a`` over ``b`` among ``curves.summarise``'s margins.  ValueError if it was not computed.

    task: None for the first that is there.
    """
    keys = {"a": a, "b": b, "axis": axis, "scale": scale} | ({"task": task} if task else {})
    if (found := next((row for row in rows if keys.items() <= row.items()), None)) is None:
        raise ValueError(f"no margin for {keys}: the records hold other methods")
    return found


def margin_words(row: dict) -> str:
    """A margin in words; the paper's NA where the budgets do not meet."""
    if row["value"] is None:
        return "not available, since the two frontiers share no budget"
    return points(row["value"], row["low"], row["high"])


def table(head: Sequence[str], body: Iterable[Sequence]) -> str:
    """A Markdown table."""
    return "\n".join("| " + " | ".join(map(str, row)) + " |" for row in (head, ("---",) * len(head), *body))
