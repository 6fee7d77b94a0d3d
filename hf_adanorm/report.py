"""The table that `inspect_model` returns: as text, as HTML in a notebook, as data for scripts."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any

from torch import nn

from ._tables import counted, html_table, text_table
from .detection import NormInfo
from .modeling_adanorm import is_swapped

HEADER = ("count", "class", "computes", "status", "names")
UNCHOSEN = ("exclude", "not in include", "not in layers")
"""Reasons that the caller's own options give."""
_FORMULAS = {"layernorm": "LayerNorm", "rmsnorm": "RMSNorm", "other": "-"}


@dataclass(kw_only=True)
class NormRow:
    """One norm of a model."""

    name: str
    module: nn.Module
    info: NormInfo
    kind: str
    """`"layernorm"`, `"rmsnorm"` or `"other"`; for a swapped norm, of the norm that was there before."""
    chosen: bool = False
    """Whether `patch_model` with the same options swaps it."""
    reason: str = ""
    """Why it does not."""

    @property
    def is_swapped(self) -> bool:
        return is_swapped(self.module)

    @property
    def num_affine_parameters(self) -> int:
        """Parameters that a swap removes."""
        return 0 if self.is_swapped else sum(p.numel() for p in self.module.parameters(recurse=False))

    @property
    def was_refused(self) -> bool:
        """Whether `patch_model` cannot swap it, or would only if it were asked to by name or kind."""
        return not self.chosen and self.reason not in UNCHOSEN


@dataclass(frozen=True, kw_only=True)
class Report:
    """Every norm of a model and what becomes of it."""

    model_class: str
    rows: tuple[NormRow, ...]
    asked: bool = True
    """Whether options chose among the norms. Without any, the stock norms of a patched model count as not chosen."""

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
        """Stock norms that it would leave alone."""
        return len(self.rows) - self.num_swapped - self.num_swappable

    @property
    def num_affine_parameters(self) -> int:
        """Gain and bias parameters that swapping them would remove."""
        return sum(row.num_affine_parameters for row in self.rows if row.chosen)

    @property
    def num_removed_parameters(self) -> int:
        """Gain and bias parameters that the swaps so far removed."""
        swapped = [row.module for row in self.rows if is_swapped(row.module) and not row.module.keeps_affine]
        sources = [module.__dict__.get("_source") for module in swapped]
        return sum(p.numel() for source in sources if source is not None for p in source.parameters())

    def to_dict(self) -> dict[str, Any]:
        """The report as JSON types."""
        return {
            "model_class": self.model_class,
            "swapped": self.num_swapped,
            "swappable": self.num_swappable,
            "skipped": self.num_skipped,
            "affine_parameters": self.num_affine_parameters,
            "norms": [
                {
                    "name": row.name,
                    "class": type(row.module).__name__,
                    "formula": row.kind,
                    "normalized_shape": list(row.info.normalized_shape),
                    "eps": row.info.eps,
                    "swapped": row.is_swapped,
                    "chosen": row.chosen,
                    "reason": row.reason,
                }
                for row in self.rows
            ],
        }

    def status(self, row: NormRow) -> str:
        """What is said of one norm."""
        if row.is_swapped:
            return f"swapped: {row.module}"
        if row.was_refused:
            return f"left alone: {row.reason}"
        if row.chosen and (self.asked or not self.num_swapped):
            return "would be swapped"
        return f"not chosen: {row.reason}" if row.reason else "not chosen"

    def table(self) -> list[tuple[str, str, str, str, str]]:
        """Norms that differ only in the numbers of their names share a line: (count, class, computes, status, names).
        `*` stands for every number; where only some have the line's status, they follow in brackets. `include` takes
        a list of such names."""
        lines: dict[tuple[str, ...], list[str]] = {}
        everywhere = Counter(_pattern(row.name) for row in self.rows)
        for row in self.rows:
            key = (type(row.module).__name__, _FORMULAS[row.kind], self.status(row), _pattern(row.name))
            lines.setdefault(key, []).append(row.name)
        out = []
        for (kind, formula, status, pattern), names in lines.items():
            if len(names) == 1:
                pattern = names[0]
            elif len(names) < everywhere[pattern]:
                pattern += f" ({_numbers(names)})"
            out.append((str(len(names)), kind, formula, status, pattern or "(the model itself)"))
        return out

    def _summary(self) -> str:
        parts = [f"{self.num_swapped} swapped ({counted(self.num_removed_parameters, 'parameter')} removed)"]
        if self.num_swappable:
            what = "would be swapped" if self.asked or not self.num_swapped else "not chosen"
            parts.append(f"{self.num_swappable} {what} ({counted(self.num_affine_parameters, 'parameter')})")
        unchosen = sum(not (row.is_swapped or row.chosen or row.was_refused) for row in self.rows)
        parts += [f"{unchosen} not chosen"] if unchosen else []
        parts.append(f"{self.num_skipped - unchosen} left alone")
        return f"{self.model_class}: {counted(len(self.rows), 'norm')}, {', '.join(parts)}"

    def __str__(self) -> str:
        return f"{self._summary()}\n{text_table(HEADER, self.table())}" if self.rows else self._summary()

    __repr__ = __str__

    def every_name(self) -> str:
        """A line for each norm, with its whole name, as text."""
        return text_table(("name", "status"), [(row.name, self.status(row)) for row in self.rows])

    def _repr_html_(self) -> str:
        return html_table(HEADER, self.table(), self._summary(), [("every name", self.every_name())])


def _numbers(names: list[str]) -> str:
    """The numbers in the names, neighbours as a range."""
    found = [[part for part in name.split(".") if part.isdigit()] for name in names]
    ranges: list[list[int]] = []
    for number in (int(parts[0]) for parts in found):
        if ranges and number == ranges[-1][1] + 1:
            ranges[-1][1] = number
        else:
            ranges.append([number, number])
    if any(len(parts) != 1 for parts in found):
        return ", ".join(".".join(parts) for parts in found)
    return ", ".join(f"{low}" if low == high else f"{low}-{high}" for low, high in ranges)


def _pattern(name: str) -> str:
    return ".".join("*" if part.isdigit() else part for part in name.split("."))
