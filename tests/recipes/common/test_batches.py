import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from common.batches import StepPlan, eval_batches, train_batches

LENGTHS = st.lists(st.integers(1, 40), min_size=12, max_size=200)


def collate(rows):
    return torch.tensor(rows)


@given(LENGTHS, st.integers(1, 6), st.integers(1, 3), st.integers(1, 2), st.integers(0, 3))
def test_an_epoch_holds_every_example_at_most_once_and_leaves_out_less_than_a_step(lengths, size, ranks, parts, epoch):
    plan = StepPlan(lengths, size, seed=0, num_processes=ranks, accumulation=parts)
    steps = plan.steps(epoch)
    used = np.concatenate(steps)
    assert len(steps) == plan.num_steps
    assert len(set(used.tolist())) == len(used)
    assert len(lengths) - len(used) < ranks * parts
    for step in steps:
        shares = [plan.micro_batches(step, rank) for rank in range(ranks)]
        assert all(len(share) == parts and all(share) for share in shares)
        assert sorted(i for share in shares for batch in share for i in batch) == sorted(step.tolist())


def test_the_same_seed_gives_the_same_steps_however_they_are_divided():
    lengths = np.random.default_rng(0).integers(1, 50, 300)
    one = StepPlan(lengths, 16, seed=3).steps(5)
    two = StepPlan(lengths, 8, seed=3, num_processes=2).steps(5)
    four = StepPlan(lengths, 4, seed=3, num_processes=2, accumulation=2).steps(5)
    for a, b, c in zip(one, two, four, strict=True):
        assert a.tolist() == b.tolist() == c.tolist()


def test_epochs_and_seeds_differ():
    plans = [StepPlan(range(1, 301), 16, seed=seed) for seed in range(3)]
    orders = {np.concatenate(plan.steps(epoch)).tobytes() for plan in plans for epoch in range(3)}
    assert len(orders) == 9


def test_grouping_by_length_saves_most_of_the_padding():
    lengths = np.random.default_rng(0).integers(1, 100, 3200)

    def padded(batches):
        return sum(lengths[batch].max() * len(batch) for batch in batches)

    plan = StepPlan(lengths, 32, seed=0)
    shuffled = np.random.default_rng(1).permutation(3200).reshape(-1, 32)
    waste = padded(plan.steps(0)) / lengths.sum() - 1
    assert waste < 0.05 < 0.5 < padded(shuffled) / lengths.sum() - 1


def test_too_few_examples_for_the_processes_are_refused():
    with pytest.raises(ValueError, match="3 training examples cannot be divided over 4 processes"):
        StepPlan([1, 2, 3], 8, seed=0, num_processes=4)


@pytest.mark.parametrize("workers", [0, 2])
def test_an_epoch_is_resumed_by_skipping_steps_and_touches_no_global_randomness(workers):
    plan = StepPlan(list(range(1, 51)), 4, seed=0, accumulation=2)
    data = list(range(50))
    state = torch.get_rng_state()
    whole = [(n, [b.tolist() for b in parts]) for n, parts in train_batches(data, plan, 1, collate=collate)]
    rest = [
        (n, [b.tolist() for b in parts])
        for n, parts in train_batches(data, plan, 1, collate=collate, skip=4, workers=workers)
    ]
    assert rest == whole[4:]
    assert len(rest) == plan.num_steps - 4
    assert torch.equal(state, torch.get_rng_state())
    sizes = [n for n, _ in train_batches(data, plan, 1, collate=collate, count=lambda step: 10 * len(step))]
    assert sizes == [10 * n for n, _ in whole]


@given(st.integers(1, 60), st.integers(1, 7), st.integers(1, 4))
def test_evaluation_covers_everything_with_equal_batches_on_every_process(total, size, ranks):
    data = list(range(100, 100 + total))
    shares = [
        list(eval_batches(data, [1] * total, size, collate=collate, rank=rank, num_processes=ranks))
        for rank in range(ranks)
    ]
    assert {tuple(len(indices) for indices, _ in share) for share in shares} == {
        tuple(len(indices) for indices, _ in shares[0])
    }
    assert {index for share in shares for indices, _ in share for index in indices} == set(range(total))
    for share in shares:
        for indices, batch in share:
            assert batch.tolist() == [data[index] for index in indices]
