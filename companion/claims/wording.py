"""Measured numbers as words, so that the book's sentences follow from what was computed."""


def points(value: float, low: float, high: float, signed: bool = True) -> str:
    """A number of percentage points with its 95 % interval, such as "+1.3 points (95 % interval −0.4 to +3.0)"."""
    form = "+.1f" if signed else ".1f"
    value, low, high = (f"{x:{form}}".replace("-", "−") for x in (value, low, high))
    return f"{value} points (95 % interval {low} to {high})"


def verdict(low: float, high: float, problems: int, better: str = "higher", worse: str = "lower") -> str:
    """What the 95 % interval of a difference allows one to say."""
    if low > 0:
        return better
    if high < 0:
        return worse
    return f"no difference that {problems} problems can resolve"


def margin(rows: list[dict], a: str, b: str, axis: str, scale: str) -> dict:
    """The margin of ``a`` over ``b`` among ``curves.summarise``'s margins.  ValueError if it was not computed."""
    keys = {"a": a, "b": b, "axis": axis, "scale": scale}
    for row in rows:
        if all(row[key] == value for key, value in keys.items()):
            return row
    raise ValueError(f"no margin for {keys}: the records hold other methods")


def margin_words(row: dict) -> str:
    """A margin in words; the paper's NA where the budgets do not meet."""
    if row["value"] is None:
        return "not available, since the two frontiers share no budget"
    return points(row["value"], row["low"], row["high"])
