"""Fade from LayerNorm to a swapped norm during training, and choose k for a pretrained model.

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

import html
import math
import numbers
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import TrainerCallback

from .detection import check_module, iter_norms
from .modeling_adanorm import SwappedNorm, check_number
from .padding import real_rows
from .saving.spec import swapped_norms, write_specs

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
                f"the fade will stand at t = {end:.2g} after the last of {state.max_steps} steps, too early for "
                "finish_fading: choose fewer fade_steps, or train on",
                stacklevel=2,
            )
        self.on_step_end(args, state, control, model=model)

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        # After the step, so that evaluation and checkpoint of step s see t(s), and a resumed run starts from it.
        set_fade(model, self.progress(state.global_step, state.max_steps), order=self.order)


# ------------------------------------------------------------------------------------------------------ calibration


@dataclass(frozen=True, kw_only=True)
class NormRange:
    """What reached one norm: y = N(x) over all rows of the batches."""

    name: str
    largest: float
    """max y: phi changes sign beyond 1 / k."""
    smallest: float
    share_falling: float
    """Share of entries with y > 1 / (2 k), where z falls as y grows."""
    share_negative: float
    """Share of entries with y > 1 / k, where phi < 0."""
    k: float
    """Proposed: the largest k, up to the one asked for, with margin / max |y|."""


@dataclass(frozen=True)
class KReport:
    """The answer of `calibrate_k`. Prints as a table."""

    norms: tuple[NormRange, ...]
    asked: float

    @property
    def k(self) -> dict[str, float]:
        """Proposed k by norm, as `patch_model(model, "adanorm", k=...)` takes it."""
        return {norm.name: norm.k for norm in self.norms}

    def _rows(self) -> list[tuple[str, ...]]:
        head = ("norm", "min y", "max y", f"y > {0.5 / self.asked:g}", f"y > {1 / self.asked:g}", "proposed k")
        rows = [
            (
                norm.name,
                f"{norm.smallest:.1f}",
                f"{norm.largest:.1f}",
                f"{norm.share_falling:.3%}",
                f"{norm.share_negative:.3%}",
                f"{norm.k:.4f}",
            )
            for norm in self.norms
        ]
        return [head, *rows]

    def __str__(self) -> str:
        rows = self._rows()
        widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
        return "\n".join(
            "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
        )

    def _repr_html_(self) -> str:
        lines = ("".join(f"<td>{html.escape(cell)}</td>" for cell in row) for row in self._rows())
        return "<table>" + "".join(f"<tr>{line}</tr>" for line in lines) + "</table>"


@torch.no_grad()
def calibrate_k(
    model: nn.Module, batches: Iterable[Mapping[str, Any]], *, k: float = 0.1, margin: float = 0.25
) -> KReport:
    """Measure y = N(x) at every norm on a few batches, and propose a k for each: min(k, margin / max |y|).

    Pretrained models have channels far out (|y| near sqrt(H - 1)); phi(y) = C (1 - k y) turns those beyond 1 / k over.
    With margin 0.25 phi stays within 0.75 C .. 1.25 C on everything seen; 0.5 is the most with which z still grows
    with y everywhere. Padding, as the batch's attention mask tells, does not count.

    Args:
        model: before or after a patch; run in evaluation mode.
        batches: keyword arguments of the forward pass, on the model's device.
        k: the largest to propose, and the one that the shares are given for.
        margin: > 0.

    Raises:
        TypeError: batches is not a list of mappings, k or margin no number, model no module.
        ValueError: no batches, no norm that ran, a number out of range, or a norm that met NaN or infinity.
    """
    check_module(model)
    check_number("k", k, minimum=0.0, inclusive=False)
    check_number("margin", margin, minimum=0.0, inclusive=False)
    if isinstance(batches, (Mapping, Tensor)) or not isinstance(batches, Iterable):
        raise TypeError(
            f"batches must be a list of batches, each {{argument name: tensor, ...}}, got {type(batches).__name__}"
        )
    norms = [(name, module, info) for name, module, info in iter_norms(model) if info.kind != "other"]
    current: Mapping[str, Any] = {}
    found: dict[str, list[float]] = {}  # name -> max, min, entries falling, entries negative, entries

    def watch(name: str, info: Any, x: Tensor) -> None:
        x = (x.movedim(1, -1) if info.channels_first else x).detach().float()
        shape = info.normalized_shape
        y = (
            F.layer_norm(x, shape, None, None, info.eps)
            if info.kind == "layernorm"
            else F.rms_norm(x, shape, None, info.eps)
        )
        real = real_rows(model, name, current, y.shape[: -len(shape)])
        y = y if real is None else y[real]
        if not y.numel():
            return
        seen = found.setdefault(name, [-math.inf, math.inf, 0.0, 0.0, 0.0])
        high, low = float(y.max()), float(y.min())
        if math.isnan(high):  # max() would pass over it
            high = math.inf
        seen[0], seen[1] = max(seen[0], high), min(seen[1], low)
        seen[2] += float((y > 0.5 / k).sum())
        seen[3] += float((y > 1 / k).sum())
        seen[4] += y.numel()

    hooks = [
        module.register_forward_pre_hook(lambda _, args, name=name, info=info: watch(name, info, args[0]))
        for name, module, info in norms
    ]
    training = {module: module.training for module in model.modules()}
    count = 0
    try:
        model.eval()
        for batch in batches:
            if not isinstance(batch, Mapping):
                raise TypeError(f"a batch must be {{argument name: tensor, ...}}, got {type(batch).__name__}")
            current = batch
            model(**batch)
            count += 1
    finally:
        for hook in hooks:
            hook.remove()
        for module, flag in training.items():
            module.training = flag
    if not count:
        raise ValueError("batches is empty: calibrate_k needs at least one batch of real data")
    if not found:
        raise ValueError(f"no norm of {type(model).__name__} ran on these batches")
    for name, (high, low, *_) in found.items():
        if not (math.isfinite(high) and math.isfinite(low)):
            raise ValueError(f"{name} met NaN or infinity on these batches: look at the weights and the inputs first")
    return KReport(
        tuple(
            NormRange(
                name=name,
                largest=high,
                smallest=low,
                share_falling=falling / entries,
                share_negative=negative / entries,
                k=min(k, margin / max(abs(high), abs(low), 1e-12)),
            )
            for name, (high, low, falling, negative, entries) in found.items()
        ),
        k,
    )
