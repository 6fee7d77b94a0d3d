"""The options of a fold, checked where they are given. Imports nothing heavy."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from hf_adanorm.norms import did_you_mean
from hf_adanorm.options import CHOICES


@dataclass(frozen=True, kw_only=True)
class Fold:
    """How `patch_model(affine=Fold(...))` and `fold_affine` fold. `affine="fold"` means `Fold()`.

    Raises:
        TypeError, ValueError: a value of the wrong type or out of range.
    """

    tied: Literal["keep", "untie"] = "keep"
    """What to do with the norm before a head that shares its weight with an embedding. `"keep"` keeps the norm as it
    is. `"untie"` gives the head a weight of its own to fold into."""
    unfoldable: Literal["keep", "approximate", "calibrate", "raise"] = "keep"
    """What to do with a norm that something else than linear layers reads. `"keep"` keeps it. `"approximate"` folds
    the mean gain of a post-norm residual norm and drops the deviations. `"calibrate"` fits gain and bias to the
    model's activations on `inputs`, which wait in temporary files. `"raise"` raises before anything changes."""
    inputs: Mapping[str, Any] | None = None
    """Keyword arguments of one forward pass; by default made from the model's config. Pass a real batch for
    `"calibrate"`, and if the default ones do not run or do not reach every part of the model."""
    tolerance: float | None = None
    """Largest change of a task output, relative to its largest value. By default, only exact folds are checked, with
    the tolerance of the coarsest type in use: 1e-10 in float64, 1e-4 in float32, 2e-2 in float16, 0.1 in bfloat16."""

    def __post_init__(self) -> None:
        for name in ("tied", "unfoldable"):
            value, choices = getattr(self, name), CHOICES[name]
            if value not in choices:
                raise ValueError(f"{name} must be one of {list(choices)}, got {value!r}{did_you_mean(value, choices)}")
        if self.inputs is not None and not isinstance(self.inputs, Mapping):
            raise TypeError(f"inputs must map argument names to tensors, got {type(self.inputs).__name__}")
        if self.unfoldable == "calibrate" and self.inputs is None:
            raise ValueError('unfoldable="calibrate" fits to real activations: pass inputs, one batch of real data')
        is_number = isinstance(self.tolerance, (int, float)) and not isinstance(self.tolerance, bool)
        if self.tolerance is not None and not (is_number and 0 <= self.tolerance < math.inf):
            raise ValueError(f"tolerance must be a finite number >= 0, got {self.tolerance!r}")
