"""The log of `watch_norms`: one `NormRecord` for every norm and recorded step, in a `NormLog`.

Statistics are per row, where a row is what is normalized together (H values of one position), then averaged over the
rows of a step; rows of padding count like others.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from hf_adanorm._tables import Printed, Row, counted

HISTOGRAM_RANGE = (-12.0, 12.0)
HISTOGRAM_BINS = 96


@dataclass(frozen=True, kw_only=True)
class NormRecord:
    """One norm at one step. x is its input, y = N(x), sigma what x is divided by; NaN: nothing to measure."""

    step: int
    """Optimizer steps done when this one ended, counted from 1."""
    name: str
    """Its name in the model."""
    norm: str
    """`"layernorm"` or `"rmsnorm"`, or the name of the swapped norm such as `"adanorm"`."""
    num_rows: int
    """Rows that a gradient came back for, over all micro-batches."""
    input_mean: float
    """Mean of x."""
    input_std: float
    """Standard deviation of x within a row, averaged over rows."""
    share_negative: float
    """Share of entries with y >= 1/k, where AdaNorm's phi(y) = C (1 - k y) is not positive."""
    share_falling: float
    """Share of entries with y > 1/(2k), beyond which AdaNorm's z = phi(y) y falls as y grows."""
    grad_output_mean: float
    """`|mean of dl/d(output)|` over a row, averaged over rows."""
    grad_output_var: float
    """Variance of dl/d(output) within a row, averaged over rows."""
    grad_detached_mean: float
    """`|mean(dl/dy)| / sigma`, which grad_input_mean would be with mean and variance detached (Theorem 1, row 1)."""
    grad_detached_var: float
    """`var(dl/dy) / sigma^2`, which grad_input_var would be with mean and variance detached."""
    grad_input_mean: float
    """`|mean of dl/dx|` over a row, averaged over rows, of the norm's own gradient. It is 0 where it re-centers."""
    grad_input_var: float
    """Variance of dl/dx within a row, averaged over rows; at most grad_detached_var where the norm re-scales it."""


FIELDS = tuple(entry.name for entry in dataclasses.fields(NormRecord))[4:]
"""The statistics of a `NormRecord`, in order."""
_HEADER = ("name", "norm", *FIELDS)


@dataclass(eq=False, repr=False)
class NormLog(Printed):
    """What `watch_norms` recorded."""

    model_class: str
    """The name of the model's class."""
    every: int
    """The distance of recorded steps."""
    k: float
    """The k for the shares of norms that have no k of their own."""
    records: list[NormRecord] = field(default_factory=list)
    """One for each norm and recorded step, in the order in which the norms ran."""
    histograms: dict[str, Tensor] = field(default_factory=dict)
    """For each norm, counts of y in 96 bins from -12 to 12 (float64), with `histogram=True`. The outer bins count what
    is beyond."""
    skipped: tuple[str, ...] = ()
    """Names of norms that are not watched, because they compute neither LayerNorm nor RMSNorm."""
    _end_step: Callable[[], None] | None = None

    @property
    def steps(self) -> list[int]:
        """The recorded steps."""
        return list(dict.fromkeys(record.step for record in self.records))

    @property
    def names(self) -> list[str]:
        """The norms that ran, in the order in which they ran."""
        return list(dict.fromkeys(record.name for record in self.records))

    def values(self, field: str) -> Tensor:
        """Return one statistic as a float64 tensor (steps, norms); NaN where a norm did not run.

        Raises:
            ValueError: no such field.
        """
        if field not in FIELDS:
            raise ValueError(f"no statistic {field!r}; there are {', '.join(FIELDS)}")
        rows = {step: i for i, step in enumerate(self.steps)}
        columns = {name: i for i, name in enumerate(self.names)}
        out = torch.full((len(rows), len(columns)), math.nan, dtype=torch.float64)
        for record in self.records:
            out[rows[record.step], columns[record.name]] = getattr(record, field)
        return out

    def scalars(self, step: int | None = None) -> dict[str, float]:
        """Return the finite statistics of one step (None: the last) in the form that trackers take, such as
        `{"norms/grad_input_var/encoder.layer.0.norm": 1e-9}`."""
        if not self.records:
            return {}
        step = self.records[-1].step if step is None else step
        return {
            f"norms/{field}/{record.name}": value
            for field in FIELDS
            for record in self.records
            if record.step == step and math.isfinite(value := getattr(record, field))
        }

    def to_rows(self) -> list[dict[str, Any]]:
        """Return the records as dictionaries of JSON types (None for NaN), for `json.dump` or a data frame."""
        return [
            {key: None if value != value else value for key, value in dataclasses.asdict(record).items()}
            for record in self.records
        ]

    def end_step(self) -> None:
        """End a step by hand, for an optimizer that is not a `torch.optim.Optimizer`, or without one.

        Raises:
            RuntimeError: outside the `with` block.
        """
        if self._end_step is None:
            raise RuntimeError("end_step was called outside the watch_norms block: nothing is being watched")
        self._end_step()

    def gather(self) -> NormLog:
        """Return the log over all processes of a distributed run; every process must call this. Without processes,
        return a copy."""
        parts: list[Any] = [(self.records, self.histograms)]
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            parts = [None] * torch.distributed.get_world_size()
            torch.distributed.all_gather_object(parts, (self.records, self.histograms))
        merged = dataclasses.replace(self, records=[], histograms={}, _end_step=None)
        together: dict[tuple[int, str], list[NormRecord]] = {}
        for records, histograms in parts:
            for record in records:
                together.setdefault((record.step, record.name), []).append(record)
            for name, counts in histograms.items():
                merged.histograms[name] = merged.histograms.get(name, 0) + counts
        for same in together.values():
            rows = sum(record.num_rows for record in same)
            means = {name: sum(getattr(record, name) * record.num_rows for record in same) / rows for name in FIELDS}
            merged.records.append(dataclasses.replace(same[0], num_rows=rows, **means))
        return merged

    def _parts(self) -> tuple[str, Row, list[Row], list[str]]:
        counts = f"{counted(len(self.names), 'norm')}, {counted(len(self.steps), 'step')} recorded"
        summary = f"{self.model_class}: {counts}{' (averages over steps)' if len(self.steps) > 1 else ''}"
        kinds = {record.name: record.norm for record in self.records}
        means = torch.stack([self.values(field).nanmean(0) for field in FIELDS], 1)
        rows: list[Row] = [
            (name, kinds[name], *(f"{mean:.3g}" for mean in row))
            for name, row in zip(self.names, means.tolist(), strict=True)
        ]
        note = "nan: nothing to measure; statistics of y need a class with `plain_settings`"
        return summary, _HEADER, rows, [note] if means.isnan().any() else []
