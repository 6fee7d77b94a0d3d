"""Steps that are not finite, and spikes: told from noise, reported with step and module, stopped at or left out."""

from __future__ import annotations

import math

import pytest
import torch
from accelerate import Accelerator
from torch import nn

from common.checkpoints import Progress
from common.options import OptimizationOptions
from common.setup import make_optimizer
from common.steps import SPIKE_WINDOW, DivergedError, check_trained, optimizer_step


class Run:
    """A linear layer trained by steps whose loss, and with it the gradient, is scaled at will."""

    def __init__(self, scaler: torch.amp.GradScaler | None = None, **options: object):
        self.options = OptimizationOptions(**options)
        self.accelerator = Accelerator(cpu=True)
        self.accelerator.scaler = scaler  # accelerate makes one on GPUs only
        self.layer = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 1))
        for parameter in self.layer.parameters():
            nn.init.constant_(parameter, 0.5)
        optimizer = make_optimizer(self.layer, self.options)
        self.model, self.optimizer = self.accelerator.prepare(self.layer, optimizer)
        if scaler is not None:
            self.accelerator.native_amp, self.accelerator.state._mixed_precision = True, "fp16"
        self.progress = Progress()

    def step(self, value: float, inputs: dict[str, torch.Tensor] | None = None, *, warming: bool = False) -> bool:
        """Return whether the step was applied. Check that only then the weights changed, and no gradient is left."""
        before = self.layer[0].weight.detach().clone()
        loss = self.model(torch.ones(1, 2)).sum() * value
        self.accelerator.backward(loss)
        parts = (self.accelerator, self.model, self.optimizer, loss.detach(), self.progress, self.options, inputs)
        applied = optimizer_step(*parts, warming=warming)
        self.progress.step += 1
        assert applied != torch.equal(before, self.layer[0].weight)
        assert self.layer[0].weight.grad is None
        return applied

    def settle(self, steps: int = SPIKE_WINDOW) -> Run:
        generator = torch.Generator().manual_seed(0)
        for _ in range(steps):
            assert self.step(1.0 + 0.2 * torch.rand((), generator=generator).item())
        return self


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_step_that_is_not_finite_stops_the_run_or_is_skipped_on_request(value, capsys):
    run = Run()
    run.step(1.0)
    with pytest.raises(DivergedError, match=r"step 2: loss .*not finite.*--on_nonfinite skip") as caught:
        run.step(value)
    assert caught.value.step == 2
    run = Run(on_nonfinite="skip")
    assert not run.step(value)
    assert "step 1: loss" in capsys.readouterr().out
    assert run.step(1.0)
    assert len(run.progress.recent_steps) == 1


def test_the_first_module_that_is_not_finite_is_named():
    run = Run()
    with torch.no_grad():
        run.layer[1].bias.fill_(math.nan)
    with pytest.raises(DivergedError, match=r"first in the output of 1 \(Linear\)"):
        run.step(1.0, {"input": torch.ones(1, 2)})


def test_a_spike_is_reported_with_step_and_module_and_training_goes_on(capsys):
    run = Run(learning_rate=1e-5).settle()
    assert capsys.readouterr().out == ""
    assert run.step(50.0)
    assert "step 129: loss " in (out := capsys.readouterr().out)
    assert "is a spike" in out
    assert "the largest gradient is that of 1.weight" in out


def test_to_report_a_spike_leaves_a_compiled_model_wrapped_as_it_was():
    run = Run(learning_rate=1e-5).settle()
    run.model = torch.compile(nn.DataParallel(run.layer), backend="eager")
    assert run.step(50.0)
    assert isinstance(run.model._orig_mod, nn.DataParallel)


def test_a_spike_stops_the_run_on_request():
    run = Run(learning_rate=1e-5, on_spike="stop").settle()
    with pytest.raises(DivergedError, match=r"step 129: loss .* is a spike.*--on_spike skip") as caught:
        run.step(50.0)
    assert caught.value.step == 129


def test_a_spike_is_left_out_on_request_until_it_is_the_rule(capsys):
    run = Run(learning_rate=1e-5, on_spike="skip").settle()
    assert not run.step(50.0)
    assert "step skipped" in capsys.readouterr().out
    assert run.step(1.1)
    assert any(run.step(50.0) for _ in range(SPIKE_WINDOW))


@pytest.mark.parametrize(("scale", "value"), [(8.0, 50.0), (1e-4, math.nan)])
def test_a_step_left_out_in_fp16_does_not_stop_the_next(scale, value):
    scaler = torch.amp.GradScaler("cpu", init_scale=scale)
    run = Run(scaler, learning_rate=1e-5, on_spike="skip", on_nonfinite="skip").settle()
    assert not run.step(value)
    assert run.step(1.1)


def test_a_spike_of_the_gradient_alone_is_one():
    run = Run(learning_rate=1e-5, on_spike="stop").settle()
    with torch.no_grad():
        run.layer[0].weight.add_(50)
        run.layer[1].bias.sub_(100.25)  # the loss is about what it was
    with pytest.raises(DivergedError, match=r"gradient norm .* is a spike"):
        run.step(1.0)


def test_nothing_is_a_spike_before_there_are_steps_or_while_the_learning_rate_rises():
    assert Run(learning_rate=1e-5, on_spike="stop").settle(SPIKE_WINDOW - 1).step(50.0)
    run = Run(on_spike="stop").settle()
    assert run.step(100.0, warming=True)
    assert len(run.progress.recent_steps) == SPIKE_WINDOW


def test_steps_that_are_all_alike_make_no_spike_of_rounding():
    run = Run(learning_rate=1e-7, on_spike="stop")
    for _ in range(SPIKE_WINDOW):
        run.step(1.0)
    assert run.step(1.0 + 1e-6)


def test_a_run_that_trained_nothing_or_was_never_evaluated_has_diverged():
    with pytest.raises(DivergedError, match="all 4 steps were skipped"):
        check_trained(Progress(step=4, skipped_steps=4, best_step=4))
    with pytest.raises(DivergedError, match="no evaluation up to step 4"):
        check_trained(Progress(step=4, skipped_steps=3))
    check_trained(Progress(step=4, skipped_steps=3, best_step=2))


def test_an_overflow_in_fp16_is_reported_left_out_and_answered_by_a_lower_scale(capsys):
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**16)
    run = Run(scaler)
    assert run.step(1.0)
    assert not run.step(3e38)  # finite itself, and not when scaled
    said = capsys.readouterr().out
    assert "step 2: overflow in fp16 at a loss scale of 65536, first in the gradient of 0.weight" in said
    assert scaler.get_scale() == 2.0**15
    assert run.step(1.0)
