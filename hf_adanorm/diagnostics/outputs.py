"""Find where two models differ, module by module, to see what a patch, a fold or a reload changed.

Both models run once on the same inputs, in evaluation mode, without gradients and with the same random state. Outputs
of modules with the same name are compared in the order in which the modules finish. So the first difference is at the
innermost module that differs.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from hf_adanorm._tables import html_table, text_table
from hf_adanorm.detection import check_module
from hf_adanorm.modeling_adanorm import check_number
from hf_adanorm.running import evaluating, hooked
from hf_adanorm.state import tensors_in

_HEADER = ("module", "class", "max |a - b|", "relative", "")


@dataclass(frozen=True, kw_only=True)
class OutputDifference:
    """The outputs of one module in both models."""

    name: str
    """Empty for the whole model."""
    class_a: str
    """The class of the module in the first model."""
    class_b: str
    """The class of the module in the second model."""
    call: int
    """0 for a module's first call; a shared module has several."""
    max_abs: float
    """Largest `|a - b|` over all tensors of the output; infinite where shapes or structures differ."""
    relative: float
    """`||a - b|| / ||a||`; 0 where both are equal."""
    note: str = ""
    """Why they cannot be compared, or ""."""


@dataclass(frozen=True, kw_only=True)
class OutputComparison:
    """The result of `compare_outputs`; prints as a table."""

    rows: tuple[OutputDifference, ...]
    """In the order in which the modules finish."""
    only_in_a: tuple[str, ...]
    """Modules that ran in the first model only."""
    only_in_b: tuple[str, ...]
    """Modules that ran in the second model only."""
    tolerance: float
    """Relative difference up to which outputs count as equal."""

    @property
    def first(self) -> OutputDifference | None:
        """The first module whose outputs differ by more than the tolerance."""
        return next((row for row in self.rows if not row.relative <= self.tolerance), None)

    @property
    def identical(self) -> bool:
        """Whether every output that both models have is the same, bit for bit."""
        return all(row.max_abs == 0 for row in self.rows)

    @property
    def output(self) -> OutputDifference:
        """The outputs of the whole models."""
        return self.rows[-1]

    def _lines(self) -> list[tuple[str, ...]]:
        lines: list[tuple[str, ...]] = []
        for row in self.rows:
            kinds = row.class_a if row.class_a == row.class_b else f"{row.class_a} -> {row.class_b}"
            name = (row.name or "(model)") + (f" [call {row.call}]" if row.call else "")
            mark = "<- first" if row is self.first else ""
            lines.append((name, kinds, f"{row.max_abs:.2e}", f"{row.relative:.2e}", row.note or mark))
        return lines

    def _summary(self) -> str:
        if self.identical:
            return f"identical: {len(self.rows)} outputs, bit for bit"
        if self.first is None:
            largest = max(row.relative for row in self.rows)
            return f"equal within {self.tolerance:g}: largest relative difference {largest:.2e}"
        differing = sum(not row.relative <= self.tolerance for row in self.rows)
        where = self.first.name or "the model's own output"
        return f"{differing} of {len(self.rows)} outputs differ by more than {self.tolerance:g}, the first is {where}"

    def __str__(self) -> str:
        table = [] if self.first is None else [text_table(_HEADER, self._lines())]
        return "\n".join([self._summary(), *table, *self._left_over()])

    __repr__ = __str__

    def _left_over(self) -> list[str]:
        both = (("first", self.only_in_a), ("second", self.only_in_b))
        return [f"only in the {which} model: {', '.join(names)}" for which, names in both if names]

    def _repr_html_(self) -> str:
        more = [(line.partition(":")[0], line.partition(": ")[2]) for line in self._left_over()]
        return html_table(_HEADER, [] if self.first is None else self._lines(), self._summary(), more)


def compare_outputs(
    model_a: nn.Module, model_b: nn.Module, inputs: Any, *, tolerance: float = 1e-5
) -> OutputComparison:
    """Run both models on the same inputs and compare the output of every module that they have in common.

    Neither model changes. Each runs in evaluation mode, on its own device. Pass a small batch, as the outputs of all
    modules stay in memory.

    Args:
        model_a: the reference.
        model_b: the other model. Its modules need the same names: compare `model.bert` with a bare `BertModel`.
        inputs: keyword arguments as a mapping, positional ones as a tuple or list, or one tensor.
        tolerance: relative difference `||a - b|| / ||a||` up to which outputs count as equal; >= 0.

    Raises:
        TypeError, ValueError: an argument of the wrong type or out of range, models without a module in common.

    Example:
        >>> import copy, torch
        >>> from transformers import BertConfig, BertModel
        >>> from hf_adanorm import compare_outputs, patch_model
        >>> config = BertConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64)
        >>> stock = BertModel(config)
        >>> patched = patch_model(copy.deepcopy(stock), "adanorm", layers=[1])
        >>> batch = {"input_ids": torch.tensor([[5, 6, 7]])}
        >>> compare_outputs(stock, patched, batch).first.name
        'encoder.layer.1.attention.output.LayerNorm'
        >>> compare_outputs(stock, copy.deepcopy(stock), batch).identical
        True
    """
    for name, model in (("model_a", model_a), ("model_b", model_b)):
        check_module(model, name)
    tolerance = check_number("tolerance", tolerance)
    outputs_a, outputs_b = _run(model_a, inputs), _run(model_b, inputs)
    modules_a, modules_b = dict(model_a.named_modules()), dict(model_b.named_modules())
    names_a, names_b = {name for name, _ in outputs_a}, {name for name, _ in outputs_b}
    if not (names_a & names_b) - {""} and (names_a | names_b) - {""}:
        raise ValueError(
            f"the two models have no module in common: {sorted(names_a - {''})[:3]} and {sorted(names_b - {''})[:3]}. "
            "If one is a part of the other, pass that part, such as model.bert"
        )
    rows = []
    for (name, call), value in outputs_a.items():
        if (name, call) in outputs_b:
            max_abs, relative, note = _difference(value, outputs_b[name, call])
            named = {
                "name": name,
                "class_a": type(modules_a[name]).__name__,
                "class_b": type(modules_b[name]).__name__,
            }
            rows.append(OutputDifference(**named, call=call, max_abs=max_abs, relative=relative, note=note))
    only_in_a, only_in_b = (
        tuple(dict.fromkeys(name for name, _ in outputs if name not in others))
        for outputs, others in ((outputs_a, names_b), (outputs_b, names_a))
    )
    return OutputComparison(rows=tuple(rows), only_in_a=only_in_a, only_in_b=only_in_b, tolerance=tolerance)


def _run(model: nn.Module, inputs: Any) -> dict[tuple[str, int], list[Tensor]]:
    """Return the output tensors of every call of every module, by name and call, in the order they finish."""
    args, kwargs = _arguments(inputs, next(model.parameters(), torch.empty(0)).device)
    found: dict[tuple[str, int], list[Tensor]] = {}

    def hook_for(name: str) -> Any:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            call = 0
            while (name, call) in found:
                call += 1
            # A copy: later modules may write into the same memory.
            found[name, call] = [tensor.detach().cpu().clone() for tensor in tensors_in(output)]

        return hook

    handles = (module.register_forward_hook(hook_for(name)) for name, module in model.named_modules())
    with hooked(handles), evaluating(model):
        model(*args, **kwargs)
    return found


def _arguments(inputs: Any, device: torch.device) -> tuple[tuple[Any, ...], dict[str, Any]]:
    def move(value: Any) -> Any:
        return value.to(device) if isinstance(value, Tensor) else value

    if isinstance(inputs, Mapping):
        return (), {key: move(value) for key, value in inputs.items()}
    if isinstance(inputs, Tensor):
        return (move(inputs),), {}
    if isinstance(inputs, Sequence) and not isinstance(inputs, str):
        return tuple(move(value) for value in inputs), {}
    raise TypeError(f"inputs must be a mapping, a sequence or a tensor, got {type(inputs).__name__}")


def _difference(a: list[Tensor], b: list[Tensor]) -> tuple[float, float, str]:
    """Return (largest |a - b|, ||a - b|| / ||a||, note) over the tensors of two outputs."""
    shapes = [[tuple(tensor.shape) for tensor in side] for side in (a, b)]
    if shapes[0] != shapes[1]:
        return math.inf, math.inf, f"shapes differ: {shapes[0]} and {shapes[1]}"
    max_abs = square = square_a = 0.0
    for left, right in zip(a, b, strict=True):
        if torch.equal(left, right) or not left.numel():
            square_a += float(left.double().square().sum()) if left.numel() else 0.0
            continue
        left, right = left.double(), right.double()
        # Equal infinities (of masks) and NaN in the same places are no difference.
        same = (left == right) | (left.isnan() & right.isnan())
        gap = torch.where(same, 0.0, left - right).nan_to_num(math.inf, math.inf, -math.inf).abs()
        max_abs = max(max_abs, float(gap.max()))
        square += float(gap.square().sum())
        square_a += float(left.nan_to_num(0.0, 0.0, 0.0).square().sum())
    if square == 0:
        return max_abs, 0.0, ""
    return max_abs, math.sqrt(square / square_a) if square_a else math.inf, ""
