import pytest

from dms_core.train.schedule import Schedule


def test_target_ratio_rises_by_one_every_steps_per_unit():
    schedule = Schedule(8.0, 100)
    assert [schedule.cr(t) for t in (0, 50, 100, 300, 700)] == [1, 1.5, 2, 4, 8]
    assert schedule.steps == 700
    assert schedule.saves() == {100: 2, 200: 3, 300: 4, 400: 5, 500: 6, 600: 7, 700: 8}
    assert {schedule.rate(t) for t in range(700)} == {1.0}
    assert Schedule(2.5, 10).saves() == {10: 2, 15: 2.5}


def test_rest_keeps_the_target_while_the_rate_falls_to_zero():
    schedule = Schedule(4.0, 10, ((2.0, 5), (4.0, 10)), warmup=2)
    assert schedule.steps == 45
    assert [schedule.cr(t) for t in range(10, 16)] == [2.0] * 6
    assert [schedule.rate(t) for t in range(10, 15)] == pytest.approx([1, 0.8, 0.6, 0.4, 0.2])
    assert [schedule.rate(t) for t in (0, 1, 2, 15, 16, 17)] == [0.5, 1, 1, 0.5, 1, 1]
    assert [schedule.cr(t) for t in (25, 35, 44)] == [3, 4, 4]
    assert schedule.saves() == {15: 2, 25: 3, 45: 4}


def test_decay_lets_the_rate_fall_over_the_last_steps_while_the_ramp_goes_on():
    schedule = Schedule(3.0, 10, warmup=2, decay=5)
    assert schedule.steps == 20 and schedule.cr(17) == 2.7
    assert [schedule.rate(t) for t in (0, 1, 14, 15, 17, 19)] == pytest.approx([0.5, 1, 1, 1, 0.6, 0.2])
    constant = Schedule(3.0, 10, ((2.0, 5), (3.0, 5)), warmup=2, decay=0)  # rests in which the rate stays
    assert constant.saves() == Schedule(3.0, 10, ((2.0, 5), (3.0, 5))).saves()
    assert [constant.rate(t) for t in range(30)] == [0.5] + [1.0] * 29
    resting = Schedule(3.0, 10, ((2.0, 5), (3.0, 5)), decay=5)
    assert [resting.rate(t) for t in (10, 14, 25, 29)] == pytest.approx([1, 1, 1, 0.2])


@pytest.mark.parametrize(
    "wrong, message",
    [
        ({"final_cr": 0.5}, "compression ratio 0.5: must be >= 1"),
        ({"steps_per_unit": 0}, "steps_per_unit 0: must be >= 1"),
        ({"rests": ((4.0, 5), (2.0, 5))}, "rests at CR .*must ascend within 1..8"),
        ({"rests": ((9.0, 5),)}, "rests at CR .*must ascend within 1..8"),
        ({"rests": ((4.0, 0),)}, "must last"),
        ({"decay": 71}, r"decay 71: must be within 0\.\.70"),
        ({"decay": -1}, "decay -1: must be within"),
    ],
)
def test_bad_schedules_are_named(wrong, message):
    with pytest.raises(ValueError, match=message):
        Schedule(**{"final_cr": 8.0, "steps_per_unit": 10, **wrong})
