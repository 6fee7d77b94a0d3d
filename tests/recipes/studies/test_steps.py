"""What the studies share of a training step."""

import pytest
import torch

from studies.steps import update, warm_up_then_decay


def test_the_rate_is_whole_after_a_tenth_and_gone_at_the_end():
    rates = [warm_up_then_decay(step, 100) for step in range(101)]
    assert rates[0] == pytest.approx(0.1)
    assert max(rates) == rates[9] == pytest.approx(0.91)
    assert rates[100] == 0.0


def test_a_step_goes_along_the_clipped_gradient_and_leaves_none():
    model = torch.nn.Linear(1, 1, bias=False)
    before = model.weight.item()
    optimizer = torch.optim.SGD(model.parameters(), lr=9.0)
    update(model, optimizer, 50.0 * model.weight.sum(), lr=0.25)
    assert model.weight.item() == pytest.approx(before - 0.25, abs=1e-5)
    assert model.weight.grad is None
