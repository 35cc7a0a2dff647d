import pytest

from companion.claims import wording

ROW = {"a": "dms", "b": "vanilla", "axis": "reads", "scale": "log2", "value": 1.26, "low": -0.4, "high": 3.0}


def test_points_carry_their_interval_and_a_minus_sign():
    assert wording.points(1.26, -0.4, 3.0) == "+1.3 points (95 % interval −0.4 to +3.0)"


@pytest.mark.parametrize(
    ("low", "high", "said"),
    [
        (0.1, 2, "higher"),
        (-2, -0.1, "lower"),
        (-1, 1, "no difference that 300 problems can resolve"),
        (0, 0, "no diff"),
    ],
)
def test_verdict_needs_an_interval_that_excludes_zero(low, high, said):
    assert wording.verdict(low, high, 300).startswith(said)


def test_margin_is_found_by_its_keys_and_rejected_when_missing():
    assert wording.margin([ROW], "dms", "vanilla", "reads", "log2") is ROW
    with pytest.raises(ValueError, match="linear"):
        wording.margin([ROW], "dms", "vanilla", "reads", "linear")


def test_margin_without_value_is_not_available():
    assert wording.margin_words({**ROW, "value": None}).startswith("not available")


def test_signed_number_without_value_is_na():
    assert [wording.signed(x) for x in (None, 0.0, -1e-12, -1.26)] == ["NA", "+0.0", "+0.0", "−1.3"]
    assert wording.interval(1.4, -0.04, 6.3) == "+1.4 [−0.0, +6.3]"  # an interval that contains zero says so
    assert wording.signed(1, 2) == "+1.00"


def test_table_has_a_line_a_row():
    assert wording.table(("a", "b"), [(1, "x")]) == "| a | b |\n| --- | --- |\n| 1 | x |"
