"""The table that `inspect_model` returns: as text, as HTML in a notebook, as data for scripts."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any

from torch import nn

from .detection import NormInfo
from .modeling_adanorm import is_swapped

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
    def status(self) -> str:
        if self.is_swapped:
            return f"swapped: {self.module}"
        return "would be swapped" if self.chosen else f"left alone: {self.reason}"


@dataclass(frozen=True, kw_only=True)
class Report:
    """Every norm of a model and what becomes of it."""

    model_class: str
    rows: tuple[NormRow, ...]

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
        sources = [row.module.__dict__.get("_source") for row in self.rows if row.is_swapped]
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

    def table(self) -> list[tuple[str, str, str, str, str]]:
        """Norms that differ only in their number share a line: (count, class, computes, status, first name)."""
        counts: Counter[tuple[str, str, str]] = Counter()
        example: dict[tuple[str, str, str], str] = {}
        for row in self.rows:
            key = (type(row.module).__name__, _FORMULAS[row.kind], row.status)
            counts[key] += 1
            example.setdefault(key, row.name)
        return [(str(number), *key, example[key]) for key, number in counts.items()]

    def _summary(self) -> str:
        parts = [f"{self.num_swapped} swapped ({self.num_removed_parameters:,} parameters removed)"]
        parts.append(f"{self.num_swappable} would be swapped ({self.num_affine_parameters:,} parameters)")
        return f"{self.model_class}: {len(self.rows)} norms, {', '.join(parts)}, {self.num_skipped} left alone"

    def __str__(self) -> str:
        header = ("count", "class", "computes", "status", "first name")
        table = [header, *self.table()]
        widths = [max(len(line[i]) for line in table) for i in range(len(header))]
        lines = [
            "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in table
        ]
        return "\n".join([self._summary(), lines[0], "  ".join("-" * width for width in widths), *lines[1:]])

    __repr__ = __str__

    def _repr_html_(self) -> str:
        import html

        cells = "".join(
            "<tr>" + "".join(f"<td style='text-align:left'>{html.escape(cell)}</td>" for cell in line) + "</tr>"
            for line in self.table()
        )
        head = "".join(f"<th>{name}</th>" for name in ("count", "class", "computes", "status", "first name"))
        return (
            f"<p>{html.escape(self._summary())}</p><table><thead><tr>{head}</tr></thead><tbody>{cells}</tbody></table>"
        )
