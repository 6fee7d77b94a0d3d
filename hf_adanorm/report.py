"""The report of `inspect_model`: a table as text, as HTML in a notebook, and as data for scripts."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from torch import nn

from ._tables import Printed, Row, counted, number_template, text_table
from .detection import NormInfo
from .modeling_adanorm import is_swapped
from .norms import computes_n
from .replaced import learned_affine, source_of

NOT_FOLDED = "_adanorm_not_folded"
"""Attribute of a norm that a fold kept: the reason."""
DEEP = 12
"""Layers from which on the report advises on k: k = 0.1 loses the gradient of 12 post-norm layers, not of 4."""
HEADER = ("count", "class", "computes", "status", "names")
_FORMULAS = {"layernorm": "LayerNorm", "rmsnorm": "RMSNorm", "other": "-"}


@dataclass(kw_only=True)
class NormRow:
    """One norm of a model."""

    name: str
    """Its name in `model.named_modules()`."""
    module: nn.Module
    """The norm itself."""
    info: NormInfo
    """What it computes."""
    kind: str
    """`"layernorm"`, `"rmsnorm"` or `"other"`; for a swapped norm, the kind of the replaced norm."""
    cause: Literal["", "chosen", "option", "branch", "obstacle"] = ""
    """What decided. `"chosen"` means that `patch_model` with the same options swaps it, `"option"` that `include`,
    `exclude` or `layers` skip it, `"branch"` that it is off the residual stream, and `"obstacle"` that these `targets`
    cannot swap it."""
    reason: str = ""
    """Why it is not chosen."""

    @property
    def chosen(self) -> bool:
        """Whether `patch_model` with the same options swaps it."""
        return self.cause == "chosen"

    @property
    def is_swapped(self) -> bool:
        """Whether it is a swapped norm now."""
        return is_swapped(self.module)


@dataclass(frozen=True, kw_only=True, repr=False)
class Report(Printed):
    """Every norm of a model and what becomes of it. Prints as a table."""

    model_class: str
    """The name of the model's class."""
    rows: tuple[NormRow, ...]
    """The norms, in the order of the model."""
    asked: bool = True
    """Whether options chose among the norms. Otherwise the stock norms of a patched model count as not chosen."""
    num_layers: int = 0
    """Layers of the longest stack that holds a norm."""

    @property
    def num_swapped(self) -> int:
        """Norms that are swapped now."""
        return sum(row.is_swapped for row in self.rows)

    @property
    def num_swappable(self) -> int:
        """Stock norms that `patch_model` with the same options would swap."""
        return sum(row.chosen and not row.is_swapped for row in self.rows)

    @property
    def num_skipped(self) -> int:
        """Stock norms that `patch_model` would skip."""
        return len(self.rows) - self.num_swapped - self.num_swappable

    @property
    def num_affine_parameters(self) -> int:
        """Gain and bias parameters that these swaps would remove."""
        stock = [row.module for row in self.rows if row.chosen and not row.is_swapped]
        return sum(p.numel() for module in stock for p in module.parameters(recurse=False))

    @property
    def num_removed_parameters(self) -> int:
        """Gain and bias parameters that the swaps so far removed."""
        swapped = [row.module for row in self.rows if is_swapped(row.module) and not learned_affine(row.module)]
        sources = [source_of(module) for module in swapped]
        return sum(p.numel() for source in sources if source is not None for p in source.parameters())

    def to_dict(self) -> dict[str, Any]:
        """Return the report as JSON types."""
        return {
            "model_class": self.model_class,
            "swapped": self.num_swapped,
            "swappable": self.num_swappable,
            "skipped": self.num_skipped,
            "affine_parameters": self.num_affine_parameters,
            "norms": [
                {
                    "name": row.name,
                    "class": class_of(row.module),
                    "formula": row.kind,
                    "normalized_shape": list(row.info.normalized_shape),
                    "eps": row.info.eps,
                    "swapped": row.is_swapped,
                    "chosen": row.chosen,
                    "cause": row.cause,
                    "reason": row.reason,
                }
                for row in self.rows
            ],
        }

    def status(self, row: NormRow) -> str:
        """Describe what becomes of one norm, in a few words."""
        if row.is_swapped:
            return f"swapped: {class_of(row.module)}({row.module.extra_repr()})"
        if reason := row.module.__dict__.get(NOT_FOLDED):
            return f"not folded: {reason}"
        if row.cause in ("branch", "obstacle"):
            return f"skipped: {row.reason}"
        if row.chosen and (self.asked or not self.num_swapped):
            return "would be swapped"
        return f"not chosen: {row.reason}" if row.reason else "not chosen"

    def table(self) -> list[tuple[str, ...]]:
        """Return lines of (count, class, computes, status, names). Norms that differ only in numbers share a line.

        `*` stands for every number. If only some of them have the status of the line, their numbers follow in
        brackets. `include` takes such names."""
        lines: dict[tuple[str, ...], list[str]] = {}
        everywhere = Counter(number_template(row.name) for row in self.rows)
        for row in self.rows:
            # A swapped norm may compute something else, such as DyT or a class of the user's.
            known = not row.is_swapped or computes_n(type(row.module.inner))
            formula = _FORMULAS[row.kind] if known else "-"
            key = (class_of(row.module), formula, self.status(row), number_template(row.name))
            lines.setdefault(key, []).append(row.name)
        out: list[tuple[str, ...]] = []
        for (kind, formula, status, pattern), names in lines.items():
            if len(names) == 1:
                pattern = names[0]
            elif len(names) < everywhere[pattern]:
                pattern += f" ({_numbers(names)})"
            out.append((str(len(names)), kind, formula, status, pattern or "(the model itself)"))
        return out

    def _summary(self) -> str:
        unchosen = sum(not row.is_swapped and row.cause == "option" for row in self.rows)
        parts = [f"{self.num_swapped} swapped ({counted(self.num_removed_parameters, 'parameter')} removed)"]
        if self.num_swappable:
            what = "would be swapped" if self.asked or not self.num_swapped else "not chosen"
            parts.append(f"{self.num_swappable} {what} ({counted(self.num_affine_parameters, 'parameter')})")
        if unchosen:
            parts.append(f"{unchosen} not chosen")
        parts.append(f"{self.num_skipped - unchosen} skipped")
        return f"{self.model_class}: {counted(len(self.rows), 'norm')}, {', '.join(parts)}"

    def notes(self) -> list[str]:
        """Return sentences about the model as a whole: norms that `targets="auto"` skips, and k in deep models."""
        notes = []
        if branch := sum(not row.is_swapped and row.cause == "branch" for row in self.rows):
            norms = counted(branch, "norm")
            notes.append(f'{norms} off the residual stream: targets="all" or include swaps them.')
        if self.num_layers >= DEEP and any(row.chosen for row in self.rows):
            k = 0.1 / self.num_layers**0.5
            notes.append(
                f"{self.num_layers} layers: post-norm models trained from scratch with AdaNorm need a small k, about "
                f"{k:.2g} (0.1 / sqrt(layers)); for pretrained weights, calibrate_k proposes k."
            )
        return notes

    def _parts(self) -> tuple[str, Row, Sequence[Row], list[str]]:
        return self._summary(), HEADER, self.table(), self.notes()

    def every_name(self) -> str:
        """Return a text with one line per norm, under its full name."""
        return text_table(("name", "status"), [(row.name, self.status(row)) for row in self.rows])


def class_of(norm: nn.Module) -> str:
    """Return the name of the class that computes."""
    return type(getattr(norm, "inner", norm)).__name__


def _numbers(names: list[str]) -> str:
    """Return the numbers in the names, with ranges for consecutive ones."""
    found = [".".join(part for part in name.split(".") if part.isdigit()) for name in names]
    if any("." in numbers for numbers in found):
        return ", ".join(found)
    ranges: list[list[str]] = []
    for number in found:
        if ranges and int(number) == int(ranges[-1][-1]) + 1:
            ranges[-1][1:] = [number]
        else:
            ranges.append([number])
    return ", ".join(map("-".join, ranges))
