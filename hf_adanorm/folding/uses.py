"""What a watched forward pass shows: who reads what, and what the model returns."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from hf_adanorm.detection import NormInfo
from hf_adanorm.running import Inputs, real_rows

# Fields of a model's output that are by-products when it has others: they may change in a fold and are listed.
SIDE_OUTPUTS = {
    "hidden_states",
    "encoder_hidden_states",
    "decoder_hidden_states",
    "encoder_last_hidden_state",
}
_SAMPLE = 1 << 20  # elements of an output that are compared


@dataclass(frozen=True)
class LinearUse:
    """A linear layer reads the norm."""

    module: str
    columns: tuple[int, ...]
    """The channel that each input feature reads; FOREIGN for another tensor's."""
    bias_arrives: bool
    dropout: bool
    unsure: bool


@dataclass(frozen=True)
class AddUse:
    """A residual connection adds the norm's output to the output of a linear layer."""

    branch: str
    """The linear layer."""
    total: int
    """The number of the sum."""
    dropout: bool
    branch_dropout: bool


@dataclass(frozen=True)
class OtherUse:
    """Anything else: `operation` inside `module`."""

    operation: str
    module: str


@dataclass(frozen=True)
class OutputUse:
    """The tensor is (part of) what the model returns, under `path`; `side`: a by-product beside task outputs."""

    path: str
    side: bool


Use = LinearUse | AddUse | OtherUse | OutputUse


@dataclass
class Watched:
    """What one forward pass showed."""

    inputs: Inputs
    uses: dict[str, list[Use]] = field(default_factory=dict)
    """Per norm, in order. A norm that did not run is missing."""
    linear_calls: dict[str, list[dict[str, tuple[int, ...]]]] = field(default_factory=dict)
    """Per linear layer and call: which norms' channels its columns read."""
    ran: dict[str, int] = field(default_factory=dict)
    """The modules that ran, numbered in the order of their first call."""
    sum_readers: dict[int, list[str]] = field(default_factory=dict)
    """Per sum: norms that read it; anything else that does appears as "!operation"."""
    linear_readers: dict[str, list[str]] = field(default_factory=dict)
    """Per linear layer: the operations that read its output, "residual" for an AddUse."""
    norm_reads: dict[str, list[int]] = field(default_factory=dict)
    """Per norm and call: the sum it read, -1 for anything else."""
    weight_readers: dict[str, str] = field(default_factory=dict)
    """Linear layers whose parameters are read outside their own forward, and by what."""
    dtypes: set[torch.dtype] = field(default_factory=set)
    """Floating-point types that were computed with."""
    outputs: dict[str, Tensor] = field(default_factory=dict)
    """A sample of each output of the model, by its path."""
    norm_outputs: dict[str, list[Tensor]] = field(default_factory=dict)
    """Per norm for which they were asked: (rows, channels) of each call, without padding."""


def norm_rows(model: nn.Module, name: str, info: NormInfo, inputs: Mapping[str, Any], output: Tensor) -> Tensor:
    """Return a copy of a norm's output as (rows, channels), without padding."""
    if info.channels_first:
        output = output.movedim(1, -1)
    flat = output.detach().reshape(-1, torch.Size(info.normalized_shape).numel())
    real = real_rows(model, name, inputs, output.shape[: -len(info.normalized_shape)])
    return flat.clone() if real is None else flat[real.reshape(-1)]


def sample(tensor: Tensor) -> Tensor:
    """Return a flat copy of a tensor, or of about a million of its elements at equal distances."""
    return tensor.detach().reshape(-1)[:: tensor.numel() // _SAMPLE + 1].clone()


def named_outputs(output: Any, prefix: str = "") -> Iterator[tuple[str, Tensor]]:
    """Yield the tensors of a model's output with their paths ("logits", "text_model_output.pooler_output")."""
    if isinstance(output, Tensor):
        yield prefix or "output", output
    elif isinstance(output, Mapping):
        for key, value in output.items():
            yield from named_outputs(value, f"{prefix}.{key}" if prefix else str(key))
    elif isinstance(output, (list, tuple)):
        for index, value in enumerate(output):
            yield from named_outputs(value, f"{prefix}.{index}" if prefix else f"output.{index}")


def is_side_output(path: str) -> bool:
    """Whether an output is a by-product when there are others: hidden states, outputs of towers in a larger model."""
    head = path.split(".")[0]
    return head in SIDE_OUTPUTS or head.endswith("_model_output") or head in ("encoder_outputs", "past_key_values")
