"""What a model is before and after a call, in a form to compare."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


def picture(model: nn.Module) -> dict[str, Any]:
    """All that a call might leave behind: tensors, modules and their plain attributes, hooks, flags, the config."""
    seen: dict[str, Any] = {f"tensor {key}": value.clone() for key, value in model.state_dict().items()}
    for name, module in model.named_modules():
        seen[f"module {name}"] = type(module)
        for key, value in vars(module).items():
            if isinstance(value, (bool, int, float, str, type(None))):
                seen[f"attribute {name} {key}"] = value
            elif "hooks" in key:
                seen[f"hooks {name} {key}"] = len(value)
    return seen | {"config": model.config.to_dict()}


def same(one: dict[str, Any], other: dict[str, Any]) -> bool:
    return one.keys() == other.keys() and all(
        torch.allclose(value, other[key], rtol=1e-6, atol=0.0) if isinstance(value, Tensor) else value == other[key]
        for key, value in one.items()
    )
