"""One optimizer step of a study, and its learning rate."""

from __future__ import annotations

import torch
from torch import Tensor, nn


def warm_up_then_decay(step: int, steps: int) -> float:
    """What multiplies the learning rate at a step counted from 0: up over the first tenth, then down to nothing."""
    return min((step + 1) / (0.1 * steps), 1.0) * (1.0 - step / steps)


def update(model: nn.Module, optimizer: torch.optim.Optimizer, objective: Tensor, lr: float) -> None:
    """Backward and a step at `lr`, with the gradient clipped to a norm of 1."""
    for group in optimizer.param_groups:
        group["lr"] = lr
    objective.backward()
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()
