"""`--affine fade` or `fold`: gains and biases fade out, k and C come in, over the first part of a training."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from options import PatchOptions

from hf_adanorm.fading import fade_at, finish_fading, set_fade


def is_fading(options: PatchOptions) -> bool:
    """Whether this run fades anything: gain and bias, or k and C alone after a fold."""
    if options.norm == "layernorm" or options.affine == "drop":
        return False
    if options.affine == "fade" or options.on_unfoldable == "fade":
        return True
    if options.on_unfoldable == "calibrate":  # the fit is made for k and C as they will be
        return False
    return options.norm == "adanorm" and (options.C, options.k) != (1.0, 0.0)


def fade(model: torch.nn.Module, step: int, total_steps: int, options: PatchOptions) -> bool:
    """Move a fade to where it is after `step` steps; whether it has arrived (always, where nothing fades).

    It depends on the step alone, so a resumed run needs no state of it.
    """
    if not is_fading(options):
        return True
    progress = fade_at(step, max(round(options.fade_ratio * total_steps), 1))
    set_fade(model, progress)
    return progress == 1


def finish_saved_fade(folder: Path, auto_class: Any) -> None:
    """Drop the state of a completed fade from a saved model: a plain patched model remains."""
    model = auto_class.from_pretrained(folder)
    finish_fading(model)
    (folder / "README.md").unlink(missing_ok=True)  # the card of the fading model; saving writes that of this one
    model.save_pretrained(folder)
