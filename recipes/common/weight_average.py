"""Averages the weights of the last checkpoints, as is common before decoding."""

from __future__ import annotations

from pathlib import Path

import torch
from accelerate.utils import SAFE_WEIGHTS_NAME
from safetensors.torch import load_file
from torch import nn


def load_average(model: nn.Module, output_dir: Path, count: int) -> list[int]:
    """Load into `model` the mean over the newest `count` checkpoints in `output_dir`; return their steps.

    Floating point tensors are averaged in float64; others are those of the newest.

    Raises FileNotFoundError when there are none.
    """
    folders = sorted(output_dir.glob("checkpoint-*"), key=lambda folder: int(folder.name.rsplit("-", 1)[1]))[-count:]
    if not folders:
        raise FileNotFoundError(f"{output_dir} holds no checkpoint to average")
    mean: dict[str, torch.Tensor] = {}
    for folder in folders:
        for name, tensor in load_file(folder / SAFE_WEIGHTS_NAME).items():
            if tensor.is_floating_point() and not name.endswith("_extra_state"):  # settings of norms
                mean[name] = mean.get(name, 0) + tensor.double() / len(folders)
            else:
                mean[name] = tensor
    missing, unexpected = model.load_state_dict(mean, strict=False)
    # Tied weights are written once, under one of their names.
    stored = {id(parameter) for name, parameter in model.named_parameters(remove_duplicate=False) if name in mean}
    untied = [
        name
        for name, parameter in model.named_parameters(remove_duplicate=False)
        if name in missing and id(parameter) not in stored
    ]
    if unexpected or untied:
        raise RuntimeError(f"the checkpoints in {output_dir} are of another model: {[*unexpected, *untied][:5]}")
    return [int(folder.name.rsplit("-", 1)[1]) for folder in folders]
