"""Which rows of a norm's input are padding, as the batch's masks tell."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn


def real_rows(model: nn.Module, name: str, inputs: Mapping[str, Any], shape: Sequence[int]) -> Tensor | None:
    """bool of `shape` (batch, length): which positions at the norm `name` are no padding; None where nothing tells.

    In an encoder-decoder the decoder has a mask of its own, and without one no padding.
    """
    two_sided = bool(getattr(getattr(model, "config", None), "is_encoder_decoder", False))
    in_decoder = two_sided and "decoder" in name.split(".")
    mask = inputs.get("decoder_attention_mask" if in_decoder else "attention_mask")
    if not isinstance(mask, Tensor) or tuple(mask.shape) != tuple(shape):
        return None
    return mask.to(torch.bool)
