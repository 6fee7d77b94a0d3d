"""Fade from LayerNorm to a swapped norm during training.

`patch_model(model, ..., affine="fade")` keeps each norm's gain and bias as constants, with a progress t in 0..1 (one
float32 element in the checkpoint). The norm computes

    z = phi(y) * gain_t * y + bias_t,   phi(y) = C_t * (1 - k_t * y) detached,   y = N(x)
    gain_t = gain + t (1 - gain),  bias_t = (1 - t) bias,  k_t = t k,  C_t = 1 + t (C - 1)

so at t = 0 it is the norm that it replaced (bit for bit; an RMSNorm in half precision to rounding, as models round it
at places of their own) and at t = 1 a plain swapped norm. `FadeCallback` moves t in Trainer,
`set_fade` in a loop of your own, both as a pure function of the step: a resumed run takes up where it was.
`finish_fading` drops the state.
"""

from __future__ import annotations

import math
import numbers
import warnings
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import TrainerCallback

from ._tables import counted
from .detection import check_module
from .modeling_adanorm import SwappedNorm, check_number
from .saving import swapped_norms, write_specs
from .swapping import all_or_nothing

Schedule = Literal["linear", "cosine"]
Order = Literal["together", "forward", "backward"]


def fade_at(step: int, num_steps: int, *, start: int = 0, schedule: Schedule = "linear") -> float:
    """Progress t in 0..1 after `step` optimizer steps: 0 up to `start`, 1 from `start + num_steps` on.

    "linear" in between, or "cosine", (1 - cos(pi * share)) / 2, which leaves and arrives gently.

    Raises:
        ValueError: a negative number, no steps, or an unknown schedule.

    >>> [fade_at(step, 4) for step in range(6)]
    [0.0, 0.25, 0.5, 0.75, 1.0, 1.0]
    """
    if not (num_steps >= 1 and step >= 0 and start >= 0):  # so that NaN is none of them
        raise ValueError(f"need num_steps >= 1, step >= 0, start >= 0, got {num_steps}, {step}, {start}")
    if schedule not in ("linear", "cosine"):
        raise ValueError(f'schedule must be "linear" or "cosine", got {schedule!r}')
    share = min(max(step - start, 0) / num_steps, 1.0)
    return share if schedule == "linear" else (1.0 - math.cos(math.pi * share)) / 2.0


def _check_order(order: str) -> None:
    if order not in ("together", "forward", "backward"):
        raise ValueError(f'order must be "together", "forward" or "backward", got {order!r}')


def _fading_norms(model: nn.Module) -> list[tuple[str, SwappedNorm]]:
    check_module(model)
    return [(name, module) for name, module in swapped_norms(model) if module.fade is not None]


@torch.no_grad()
def set_fade(model: nn.Module, t: float | Tensor, *, order: Order = "together") -> None:
    """Set the progress of every fading norm of `model`, wrapped (DDP, compiled) or not. Nothing is compiled anew.

    Args:
        t: 0 (the norms as they were) to 1 (plain swapped norms).
        order: "together" gives every norm t. "forward" fades norm after norm, from the first to the last: norm i of n
            is at n * t - i, kept within 0..1. "backward" begins with the last.

    Raises:
        TypeError: t is no number, model no module.
        ValueError: t outside 0..1, an unknown order, or no norm is fading.
    """
    given = t.item() if isinstance(t, Tensor) and t.numel() == 1 else t
    progress = check_number("t", given, minimum=0.0, inclusive=True, maximum=1.0)
    _check_order(order)
    norms = _fading_norms(model)
    if not norms:
        raise ValueError(f'{type(model).__name__} has no fading norms: patch_model(model, affine="fade") makes them')
    if order == "backward":
        norms.reverse()
    for index, (_, norm) in enumerate(norms):
        value = progress if order == "together" else min(max(len(norms) * progress - index, 0.0), 1.0)
        norm.fade_progress.fill_(value)  # type: ignore[operator]
        norm.__dict__["_fade_is_led"] = True  # so that saving does not warn of a fade that nobody moves


def finish_fading(model: nn.Module) -> None:
    """Drop gains, biases and progress of a completed fade and rewrite the spec: what remains is a plain patched model.

    Call it once, after training; also where k and C alone were on their way (after a fold).

    Raises:
        ValueError: no norm is fading, or one has not arrived at t = 1 (dropping its state would change the model).
    """
    norms = _fading_norms(model)
    if not norms:
        raise ValueError(f"{type(model).__name__} has no fading norms")
    for name, norm in norms:
        progress = float(norm.fade_progress)  # type: ignore[arg-type]
        if progress != 1.0:
            raise ValueError(
                f"{name} is at t = {progress:g} of its fade: to finish now would change the model. Train on, or call "
                f"set_fade(model, 1.0) first"
            )
    with all_or_nothing(model):
        for _, norm in norms:
            norm.stop_fade()
        write_specs(model)


class FadeCallback(TrainerCallback):
    """Moves the fade of a model in `Trainer`, once per optimizer step.

    Call `finish_fading(trainer.model)` when training has ended. With `load_best_model_at_end` the best checkpoint may
    be one from the middle of the fade: evaluate from the end of it on (`eval_delay`), or choose by hand.

    Args:
        fade_steps: optimizer steps from t = 0 to t = 1; a float up to 1.0 is a share of all steps.
        start: steps before the fade begins.
        schedule: "linear" or "cosine", see `fade_at`.
        order: "together", "forward" or "backward", see `set_fade`.

    Example:
        >>> callback = FadeCallback(fade_steps=0.6, schedule="cosine")
        >>> round(callback.progress(step=30, max_steps=100), 6)
        0.5
    """

    def __init__(
        self,
        fade_steps: int | float = 0.6,
        *,
        start: int = 0,
        schedule: Schedule = "linear",
        order: Order = "together",
    ) -> None:
        number = check_number("fade_steps", fade_steps, minimum=0.0, inclusive=False)
        given: Any = fade_steps
        fade_steps = int(number) if isinstance(given, numbers.Integral) else number
        if isinstance(fade_steps, float) and fade_steps > 1.0:
            raise ValueError(
                f"fade_steps={fade_steps!r} as a share of all steps must be at most 1.0; a count is an int"
            )
        self.fade_steps, self.start = fade_steps, start
        self.schedule: Schedule = schedule
        self.order: Order = order
        fade_at(0, 1, start=start, schedule=schedule)  # raises for a bad start or schedule
        _check_order(order)

    def progress(self, step: int, max_steps: int) -> float:
        steps = self.fade_steps if isinstance(self.fade_steps, int) else round(self.fade_steps * max_steps)
        return fade_at(step, max(int(steps), 1), start=self.start, schedule=self.schedule)

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        if (end := self.progress(state.max_steps, state.max_steps)) < 1.0:
            warnings.warn(
                f"the fade will stand at t = {end:.2g} after the last of {counted(state.max_steps, 'step')}, too "
                "early for finish_fading: choose fewer fade_steps, or train on",
                stacklevel=2,
            )
        self.on_step_end(args, state, control, model=model)

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        # After the step, so that evaluation and checkpoint of step s see t(s), and a resumed run starts from it.
        set_fade(model, self.progress(state.global_step, state.max_steps), order=self.order)
