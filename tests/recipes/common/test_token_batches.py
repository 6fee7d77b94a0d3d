"""Batches by token budget."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from common.token_batches import TokenPlan

lengths = st.lists(st.tuples(st.integers(1, 40), st.integers(1, 40)), min_size=1, max_size=200)


def plan_for(pairs, max_tokens=64, **settings):
    source, target = zip(*pairs, strict=True)
    return TokenPlan(source, target, max_tokens, **{"seed": 3, **settings})


def some_pairs(count=300):
    draw = np.random.default_rng(0)
    return list(zip(draw.integers(2, 40, count).tolist(), draw.integers(2, 40, count).tolist(), strict=True))


@given(lengths, st.integers(0, 3))
def test_every_sentence_once_an_epoch_within_the_budget(pairs, epoch):
    plan = plan_for(pairs)
    steps = plan.steps(epoch)
    assert len(steps) == plan.num_steps
    batches = [batch for step in steps for batch in plan.micro_batches(step, 0)]
    assert sorted(index for batch in batches for index in batch) == list(range(len(pairs)))
    for batch in batches:
        assert len(batch) * max(max(pairs[index]) for index in batch) <= 64


@given(lengths)
def test_neighboring_micro_batches_could_not_be_one(pairs):
    plan = plan_for(pairs)
    sizes = np.diff([0, *plan.cuts, len(pairs)])
    order = np.lexsort((plan.source_lengths, plan.target_lengths))
    start = 0
    for size in sizes[:-1]:
        longest = plan.lengths[order[start : start + size + 1]].max()
        assert (size + 1) * longest > 64
        start += size


def test_two_processes_and_two_accumulated_micro_batches_take_the_same_steps():
    one, two = plan_for(some_pairs(), accumulation=2), plan_for(some_pairs(), num_processes=2)
    for left, right in zip(one.steps(1), two.steps(1), strict=True):
        shares = [two.micro_batches(right, rank) for rank in (0, 1)]
        assert [len(share) for share in shares] == [1, 1]
        assert one.micro_batches(left, 0) == shares[0] + shares[1]
        assert one.target_tokens(left) == two.target_tokens(right)
        assert one.num_examples(left) == two.num_examples(right) == sum(map(len, shares[0] + shares[1]))


def test_processes_have_about_the_same_work_at_the_same_time():
    plan = plan_for(some_pairs(2000), max_tokens=400, num_processes=2, accumulation=4)
    shares = [[len(batch) for step in plan.steps(0) for batch in plan.micro_batches(step, rank)] for rank in (0, 1)]
    assert len(shares[0]) == len(shares[1])
    assert sum(shares[0]) == pytest.approx(sum(shares[1]), rel=0.1)


def test_the_order_depends_on_seed_and_epoch_alone():
    def flat(epoch, **settings):
        return [batch.tolist() for step in plan_for(some_pairs(), **settings).steps(epoch) for batch in step]

    assert flat(2) == flat(2)
    assert flat(2) not in (flat(3), flat(2, seed=4))


@pytest.mark.parametrize(
    ("pairs", "settings", "said"),
    [
        ([(3, 70)], {}, "--max_tokens 64: the longest training sentence alone has 70 tokens"),
        ([(3, 3)] * 5, {"num_processes": 4}, "not enough for 4 processes"),
    ],
)
def test_impossible_plans_are_refused(pairs, settings, said):
    with pytest.raises(ValueError, match=said):
        plan_for(pairs, **settings)
