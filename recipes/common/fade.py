"""`--affine fade` or `fold`: gains and biases fade out, k and C come in, over the first part of a training."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from common.options import PatchOptions
from common.saved import load_saved
from hf_adanorm.fading import fade_at, finish_fading, set_fade


def is_fading(model: torch.nn.Module, options: PatchOptions) -> bool:
    """Whether anything of this model, wrapped or not, fades: gain and bias, or k and C alone after a fold."""
    if options.norm == "layernorm" or options.affine == "drop":
        return False  # without a look at every module at every step
    return any(getattr(module, "fade", None) is not None for module in model.modules())


def fade(model: torch.nn.Module, step: int, total_steps: int, options: PatchOptions) -> bool:
    """Move a fade to where it is after `step` steps; whether it has arrived (always, where nothing fades).

    It depends on the step alone, so a resumed run needs no state of it.
    """
    if not is_fading(model, options):
        return True
    progress = fade_at(step, max(round(options.fade_ratio * total_steps), 1))
    set_fade(model, progress)
    return progress == 1


def finish_saved_fade(folder: Path, auto_class: Any) -> None:
    """Drop the state of a completed fade from a saved model: a plain patched model remains."""
    model = load_saved(auto_class, folder)
    finish_fading(model)
    (folder / "README.md").unlink(missing_ok=True)  # the card of the fading model; saving writes that of this one
    model.save_pretrained(folder)
