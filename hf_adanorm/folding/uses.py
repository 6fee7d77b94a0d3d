"""Who reads what, as the watched forward passes showed it (`consumers.py`)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

# Fields of a model's output that are by-products when it has others: they may change in a fold and are listed.
SIDE_OUTPUTS = {
    "hidden_states",
    "encoder_hidden_states",
    "decoder_hidden_states",
    "encoder_last_hidden_state",
}


@dataclass(frozen=True)
class LinearUse:
    """A linear layer reads the norm; `columns[j]` is the channel that input feature j reads (FOREIGN: another
    tensor's)."""

    module: str
    columns: tuple[int, ...]
    bias_arrives: bool
    dropout: bool
    unsure: bool
    run: int = 1
    """In which forward pass, counted from 1."""


@dataclass(frozen=True)
class AddUse:
    """A residual connection adds the norm's output to the output of the linear layer `branch`; `total` names the
    sum."""

    branch: str
    total: int
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
    """What the forward passes showed."""

    uses: dict[str, list[Use]]
    """Per norm, in order. A norm that did not run is missing."""
    linear_calls: dict[str, list[dict[str, tuple[int, ...]]]]
    """Per linear layer and call: which norms' channels its columns read."""
    ran: dict[str, int]
    """The modules that ran, numbered in the order of their first call."""
    sum_readers: dict[int, list[str]] = field(default_factory=dict)
    """Per sum: norms that read it; anything else that does appears as "!operation"."""
    linear_readers: dict[str, list[str]] = field(default_factory=dict)
    """Per linear layer (with `follow_sums`): the operations that read its output, "residual" for an AddUse."""
    norm_reads: dict[str, list[int]] = field(default_factory=dict)
    """Per norm and call: the sum it read, -1 for anything else."""
    weight_readers: dict[str, str] = field(default_factory=dict)
    """Linear layers whose parameters are read outside their own forward, and by what."""
    outputs: Any = None
    """Of the first pass."""
    num_runs: int = 0
    in_training: dict[str, str] = field(default_factory=dict)
    """Per norm: what reads it in training mode only."""


def reader_of(use: Use) -> str:
    if isinstance(use, LinearUse):
        return use.module
    if isinstance(use, OtherUse):
        return f"{use.operation} in {use.module or 'the model'}"
    return "a sum" if isinstance(use, AddUse) else "the model's output"


def named_outputs(output: Any, prefix: str = "") -> Iterator[tuple[str, Tensor]]:
    """The tensors of a model's output with their paths ("logits", "text_model_output.pooler_output")."""
    if isinstance(output, Tensor):
        yield prefix or "output", output
    elif isinstance(output, Mapping):
        for key, value in output.items():
            yield from named_outputs(value, f"{prefix}.{key}" if prefix else str(key))
    elif isinstance(output, (list, tuple)):
        for index, value in enumerate(output):
            yield from named_outputs(value, f"{prefix}.{index}" if prefix else f"output.{index}")


def is_side_output(path: str) -> bool:
    """Hidden states and the outputs of towers inside a larger model, which are by-products when there are others."""
    head = path.split(".")[0]
    return head in SIDE_OUTPUTS or head.endswith("_model_output") or head in ("encoder_outputs", "past_key_values")
