"""Change the settings of swapped norms after patching: immediately (`set_norm`) or over the steps of a training.

    set_norm(model, k=0.05)                                              # every AdaNorm
    trainer.add_callback(NormScheduleCallback(k=(0.0, 0.1), over=0.5))   # from 0 to 0.1 in the first half
    NormSchedule(k=(0.0, 0.1), over=1000).apply(model, step, num_steps)  # in your own loop, after each update

The settings are part of the state dict of a norm. So save_pretrained, load_state_dict, accelerate and the
Trainer's best checkpoint keep and restore them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from transformers import TrainerCallback

from .modeling_adanorm import is_swapped
from .norms import check_value, did_you_mean
from .selection import Patterns, check_choice, match_names
from .state import State


def set_norm(model: nn.Module, *, include: Patterns = None, **settings: Any) -> list[str]:
    """Change settings of swapped norms, such as `set_norm(model, k=0.05)`.

    Args:
        model: a patched model, also one that is wrapped, compiled or distributed.
        include: name endings, or regular expressions after "re:", as in `patch_model`. None means every norm that has
            these settings.
        **settings: new values, checked by the norm's constructor.

    Returns:
        The names of the norms that now have these values.

    Raises:
        ValueError, TypeError: the constructor refuses a value; a norm does not have the setting; a setting that only
            initializes a parameter, such as DyT's alpha, or is no attribute; a pattern without a match. Nothing has
            changed then.
    """
    if not settings:
        raise ValueError("set_norm needs at least one setting, such as k=0.05")
    for name, value in settings.items():
        check_value(name, value)
    norms = _choose(model, include, settings)
    if all(settings.items() <= norm.settings().items() for norm in norms.values()):
        return list(norms)
    planned = {}
    for name, norm in norms.items():
        planned[norm] = norm.fresh(**settings)
        _refuse_starts(name, norm.fresh(), planned[norm], settings)
    before = State(*planned)
    try:
        for norm, new in planned.items():
            norm.adopt(new, settings)
    except BaseException:
        before.restore()
        raise
    return list(norms)


def _choose(model: nn.Module, include: Patterns, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return the norms that are meant, by name; those that appear under several names once."""
    swapped = {name: module for name, module in model.named_modules() if is_swapped(module)}
    if not swapped:
        raise ValueError(f"this {type(model).__name__} has no swapped norms: call patch_model first")
    if include is not None:
        chosen = match_names("include", include, list(swapped))
        swapped = {name: norm for name, norm in swapped.items() if name in chosen}
    found = {name: norm for name, norm in swapped.items() if settings.keys() <= norm.settings().keys()}
    if not found or (include is not None and found != swapped):
        name, norm = next(item for item in swapped.items() if item[0] not in found)
        own = norm.settings()
        missing = next(key for key in settings if key not in own)
        raise ValueError(
            f"{name} ({norm.norm_name}) has no setting {missing!r}; it has {sorted(own)}{did_you_mean(missing, own)}"
        )
    return found


def _refuse_starts(name: str, old: Any, new: Any, settings: Mapping[str, Any]) -> None:
    """Raise ValueError for a setting that shows in a tensor, or in nothing, once the norm is built."""
    tensors = zip(old.state_dict(keep_vars=True).items(), new.state_dict(keep_vars=True).values(), strict=True)
    starts = any(not torch.equal(a, b) for (key, a), b in tensors if not key.endswith("_extra_state"))
    if starts or not settings.keys() <= vars(new.inner).keys():
        why = "only starts a parameter" if starts else f"is no attribute of {type(new.inner).__name__}"
        raise ValueError(f"{', '.join(settings)} of {name} {why}: it can be set in patch_model, not afterwards")


def _is_finite(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


class NormSchedule:
    """A change of settings over training steps.

    Args:
        begin: when it begins: a number of updates (int) or a fraction of the training (float).
        over: how long it takes, likewise.
        shape: "linear" or "cosine" (slow at both ends).
        include: as in `set_norm`.
        **settings: a pair (first value, last value) for each, up or down.

    Raises:
        ValueError, TypeError: an argument of the wrong type or out of range.
    """

    def __init__(
        self,
        *,
        begin: float = 0,
        over: float = 1.0,
        shape: str = "linear",
        include: Patterns = None,
        **settings: tuple[float, float],
    ) -> None:
        if not settings:
            raise ValueError("a schedule needs at least one setting, such as k=(0.0, 0.1)")
        for name, pair in settings.items():
            if not isinstance(pair, (tuple, list)) or len(pair) != 2 or not all(map(_is_finite, pair)):
                raise TypeError(f"{name} must be a pair of numbers, such as (0.0, 0.1), got {pair!r:.80}")
        for name, value in (("begin", begin), ("over", over)):
            if not _is_finite(value) or value < 0 or (isinstance(value, float) and value > 1):
                raise ValueError(
                    f"{name} must be an int >= 0 (updates) or a float in 0..1 (a fraction), got {value!r:.80}"
                )
        check_choice("shape", shape, ("linear", "cosine"))
        self.begin, self.over, self.shape, self.include = begin, over, shape, include
        self.pairs = {name: (float(first), float(last)) for name, (first, last) in settings.items()}

    def values(self, step: int, num_steps: int) -> dict[str, float]:
        """Return the settings after `step` of `num_steps` updates; exact at both ends."""
        begin, over = (value * num_steps if isinstance(value, float) else value for value in (self.begin, self.over))
        t = min(max((step - begin) / over, 0.0), 1.0) if over else float(step >= begin)
        if self.shape == "cosine":
            t = (1.0 - math.cos(math.pi * t)) / 2.0
        return {name: (1.0 - t) * first + t * last for name, (first, last) in self.pairs.items()}

    def apply(self, model: nn.Module, step: int, num_steps: int) -> dict[str, float]:
        """Set the norms of `model` to `values(step, num_steps)` and return those; before the first update and after
        each one, so that a checkpoint holds the values of its step."""
        values = self.values(step, num_steps)
        set_norm(model, include=self.include, **values)
        return values


class NormScheduleCallback(TrainerCallback):
    """Apply a `NormSchedule` in a Trainer::

        trainer.add_callback(NormScheduleCallback(k=(0.0, 0.1), over=0.5, shape="cosine"))

    It takes the same arguments, and resumes where the training resumes.
    """

    def __init__(self, **schedule: Any) -> None:
        self.schedule = NormSchedule(**schedule)

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        for value in (0, state.max_steps, state.global_step):  # a value that the norm refuses raises here
            self.schedule.apply(model, value, state.max_steps)

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        self.schedule.apply(model, state.global_step, state.max_steps)

    def on_train_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        # The best checkpoint of an adapter does not hold the norms of its base model.
        best = getattr(state, "best_global_step", None)
        if args.load_best_model_at_end and state.best_model_checkpoint is not None and best is not None:
            self.schedule.apply(model, best, state.max_steps)
