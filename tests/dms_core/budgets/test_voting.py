"""From chain records to credits and costs, by hand; what `summarise` makes of them is in test_curves.py."""

import numpy as np
import pytest

from dms_core.budgets.voting import GOLD, MAX_SUBSETS, Scores, _subsets, make_scores, resampled, shared_problems, vote


def chain(problem, index, **more):
    """8 tokens after a prompt of 10, sampled at 0, 4, 8: live 10, 14, 12, reads 0, 50, 100."""
    record = {"method": "dms", "cr": 4, "problem": problem, "chain": index, "answer": "1", "gold": "1"}
    record |= {"finished_at": 8, "tokens": 8, "stride": 4, "prompt_tokens": 10, "prompt_live": 10}
    return record | {"live": [10, 14, 12], "reads": [0, 50, 100]} | more


def scores(records, lengths=(4, 8), widths=(1, 2), aggregate="vote", seed=0) -> list[Scores]:
    return make_scores(records, lengths, widths, aggregate, seed)


def test_scores_of_two_chains_by_hand():
    right, wrong = chain("a", 0, seconds=[0, 1, 2]), chain("a", 1, answer="2", finished_at=4, seconds=[0, 2, 4])
    (found,) = scores([wrong, right])
    assert (found.method, found.cr, found.task, found.seeds, found.problems) == ("dms", 4, None, (0,), ("a",))
    assert (found.lengths, found.widths, found.chains.tolist()) == ((4, 8), (1, 2), [[2]])
    assert found.credit.tolist() == [[[[0, 0], [0.5, 0.5]]]]  # at 4 the wrong chain alone has answered
    assert found.alone.tolist() == [[[0, 0.5]]] and found.ended.tolist() == [[[0.5, 1]]]
    assert found.costs["reads"].tolist() == [[[[50, 100], [100, 200]]]]
    assert found.costs["peak"].tolist() == [[[[14, 18], [14, 18]]]]  # the prompt's 10 once, 4 more a chain at most
    assert found.costs["seconds"].tolist() == [[[[1.5, 3], [3, 6]]]]
    assert type(found.cr) is int and list(found.costs) == ["reads", "peak", "seconds"]


def test_a_chain_that_ended_without_an_answer_has_no_vote():
    (found,) = scores([chain(0, 0, answer=None), chain(0, 1, answer=None), chain(0, 2)], (8,), (1, 3))
    assert found.credit.tolist() == [[[[pytest.approx(1 / 3), 1]]]] and found.ended.tolist() == [[[1]]]


def test_a_chain_of_fewer_live_tokens_than_its_prompt_adds_nothing_to_the_peak():
    (found,) = scores([chain(0, 0, live=[7, 8, 9])], (8,), (1,))
    assert found.costs["peak"].tolist() == [[[[10]]]]


def test_chains_share_what_is_kept_of_the_prompt_for_good():
    (found,) = scores([chain(0, i, prompt_kept=6) for i in range(4)], (4, 8), (1, 4))
    assert found.costs["peak"].tolist() == [[[[14, 6 + 4 * 8]] * 2]]  # of the 10 live after the prefill 4 will go
    assert found.kept.tolist() == [[6]] and np.isnan(scores([chain(0, 0)])[0].kept).all()
    with pytest.raises(ValueError, match=r"prompt_kept .*: must be finite"):
        scores([chain(0, 0, prompt_kept=float("nan"))])


def test_seeds_problems_and_ratios_are_sorted_and_shared_by_all_seeds():
    records = [chain(p, 0, retrofit_seed=s, cr=cr) for cr in (8, 2.5) for s, p in ((3, 1), (1, 2), (1, 1), (3, 0))]
    low, high = scores(records)
    assert (low.cr, high.cr) == (2.5, 8) and low.seeds == (1, 3) and low.problems == (1,)
    assert low.credit.shape == (2, 1, 2, 1) and low.widths == (1,)
    with pytest.raises(ValueError, match=r"retrofit seeds \[0, 1\] of method dms, CR 4: must have a problem in common"):
        scores([chain(0, 0, retrofit_seed=0), chain(1, 0, retrofit_seed=1)])


def test_rows_are_those_of_the_problems_named_in_their_order():
    records = [chain(p, c, answer="1" if p == c else "2") for p in range(3) for c in range(2)]
    (found,) = scores(records)
    assert found.rows("alone", [2, 0]).tolist() == [[[0, 0], [0, 0.5]]]
    assert found.rows("reads", [1]).tolist() == [[[50, 100, 100, 200]]]
    means = resampled([found, found], "credit", [0, 1, 2], (3, 0))
    assert means.shape == (4, 8) and means[0].tolist() == pytest.approx([0, 0, 100 / 3, 100 / 3] * 2)
    assert resampled([found], "reads", [0, 1, 2], (1, 0))[0].tolist() == pytest.approx([50, 100, 100, 200])


def test_shared_problems_are_those_of_all_and_several_seeds_must_be_the_same():
    one, two = (scores([chain(p, 0, retrofit_seed=s) for p in range(n) for s in seeds])[0]
                for n, seeds in ((3, (0,)), (2, (0, 1))))  # fmt: skip
    other = scores([chain(p, 0, retrofit_seed=s, method="dmc") for p in range(4) for s in (0, 2)])[0]
    assert shared_problems([one, two]) == [0, 1] == shared_problems([two, two])
    with pytest.raises(ValueError, match=r"retrofit seeds \[\(0, 1\), \(0, 2\)\] of dms, dmc: must be the same ones"):
        shared_problems([one, two, other])


def test_choices_of_chains_are_all_of_few_and_distinct_draws_of_many():
    assert _subsets(4, 2, 0).tolist() == [[0, 1], [0, 2], [0, 3], [1, 2], [1, 3], [2, 3]]
    assert (
        len(_subsets(MAX_SUBSETS + 8, 1, 0)) == MAX_SUBSETS + 8 and len(_subsets(MAX_SUBSETS, MAX_SUBSETS - 1, 0)) == 32
    )
    drawn = _subsets(16, 5, 0)
    assert drawn.shape == (MAX_SUBSETS, 5) and all(len(set(row)) == 5 for row in drawn.tolist())
    assert set(drawn.flatten().tolist()) == set(range(16)) and not np.array_equal(drawn, _subsets(16, 5, 1))


def test_answers_that_differ_are_told_apart_and_those_alike_vote_together():
    answers = ["1", "2", "3", "2", None]
    (found,) = scores([chain(0, c, answer=a) for c, a in enumerate(answers)], (8,), (5,))
    assert found.credit.tolist() == [[[[0]]]] == [[[[float(vote(np.array([GOLD, 1, 2, 1, -1]), GOLD))]]]]
    (found,) = scores([chain(0, c, answer=a) for c, a in enumerate(["1", "2", "3"])], (8,), (3,))
    assert found.credit.tolist() == [[[[pytest.approx(1 / 3)]]]]


@pytest.mark.parametrize("samples", [3, 4])
def test_a_last_sample_may_be_stored_twice(samples):
    values = {"live": [10, 14, 12, 12][:samples], "reads": [0, 50, 100, 100][:samples]}
    (found,) = scores([chain(0, 0, **values)], (8,), (1,))
    assert found.costs["reads"].tolist() == [[[[100]]]]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tokens": 0}, "tokens, stride, cr 0, 4, 4 "),
        ({"stride": 0}, "tokens, stride, cr 8, 0, 4 "),
        ({"cr": 0.99}, r"cr 8, 4, 0\.99"),
        ({"live": [10] * 2, "reads": [0] * 2}, "live, reads of 2, 2 samples .*: must be 3 each"),
        ({"live": [10] * 5, "reads": [0] * 5}, "live, reads of 5, 5 samples .*: must be 3 each"),
        ({"reads": [0] * 4}, "live, reads of 3, 4 samples"),
        ({"seconds": [0, 1]}, "seconds of 2 samples .*: must be 3"),
        ({"seconds": [0, 1, np.inf]}, "must be finite"),
        ({"live": [10, np.nan, 12]}, "must be finite"),
        ({"reads": [0, np.nan, 12]}, "must be finite"),
        ({"prompt_live": np.nan}, "must be finite"),
        ({"correct": None}, "correct None"),
    ],
)
def test_a_record_out_of_order_is_named(change, message):
    with pytest.raises(ValueError, match=message):
        scores([chain(0, 0, **change)])
    assert scores([chain(0, 0, tokens=1, stride=1, cr=1, live=[10, 11], reads=[0, 5], finished_at=1)])
