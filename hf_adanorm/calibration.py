"""Propose k for each norm of a pretrained model, from what reaches the norms on a few batches."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from ._tables import Printed, Row
from .detection import check_module, iter_norms
from .modeling_adanorm import check_number
from .running import SLOW_BAR, evaluating, hooked, real_rows


@dataclass(frozen=True, kw_only=True)
class NormRange:
    """The range of y = N(x) at one norm, over all rows of the batches."""

    name: str
    """Its name in the model."""
    largest: float
    """The largest y. phi changes sign beyond 1 / k."""
    smallest: float
    """The smallest y."""
    share_falling: float
    """Share of entries with y > 1 / (2 k), where z falls as y grows."""
    share_negative: float
    """Share of entries with y > 1 / k, where phi < 0."""
    k: float
    """The proposed k, `margin / max |y|`, at most the one asked for."""


@dataclass(frozen=True, repr=False)
class KReport(Printed):
    """The result of `calibrate_k`; prints as a table."""

    norms: tuple[NormRange, ...]
    """What reached each norm, and the k proposed for it."""
    asked: float
    """The largest k that was allowed."""

    @property
    def k(self) -> dict[str, float]:
        """The proposed k of each norm, as `patch_model(model, "adanorm", k=...)` takes it."""
        return {norm.name: norm.k for norm in self.norms}

    def _parts(self) -> tuple[str, Row, list[Row], list[str]]:
        head = ("norm", "min y", "max y", f"y > {0.5 / self.asked:g}", f"y > {1 / self.asked:g}", "proposed k")
        formats = (".1f", ".1f", ".3%", ".3%", ".4f")
        values = [(n.smallest, n.largest, n.share_falling, n.share_negative, n.k) for n in self.norms]
        rows: list[Row] = [(n.name, *map(format, row, formats)) for n, row in zip(self.norms, values, strict=True)]
        return "", head, rows, []


@torch.no_grad()
def calibrate_k(
    model: nn.Module, batches: Iterable[Mapping[str, Any]], *, k: float = 0.1, margin: float = 0.25
) -> KReport:
    """Measure y = N(x) at every norm on a few batches, and propose a k for each: min(k, margin / max `|y|`).

    Pretrained models have outlier channels, whose y comes near sqrt(H - 1). Beyond y = 1 / k, phi(y) = C (1 - k y) is
    negative and flips their sign. With margin 0.25, phi stays within 0.75 C .. 1.25 C on these batches. 0.5 is the
    largest margin with which z = phi(y) y grows with y everywhere. Padding does not count.

    Args:
        model: before or after a patch; runs in evaluation mode.
        batches: keyword arguments of the forward pass, on the model's device.
        k: the largest to propose, and the one that the reported shares belong to.
        margin: > 0.

    Raises:
        TypeError: batches is not a list of mappings, k or margin is not a number, or model is not a module.
        ValueError: no batches, no norm that ran, a number out of range, or NaN or infinity at a norm.
    """
    check_module(model)
    check_number("k", k, inclusive=False)
    check_number("margin", margin, inclusive=False)
    if isinstance(batches, (Mapping, Tensor)) or not isinstance(batches, Iterable):
        raise TypeError(f"batches must be a list of batches, got {type(batches).__name__}")
    norms = [(name, module, info) for name, module, info in iter_norms(model) if info.kind != "other"]
    current: Mapping[str, Any] = {}
    found: dict[str, list[float]] = {}  # name -> max, min, entries falling, entries negative, entries

    def watch(name: str, info: Any, x: Tensor) -> None:
        x = (x.movedim(1, -1) if info.channels_first else x).detach().float()
        shape = info.normalized_shape
        y = (F.layer_norm if info.kind == "layernorm" else F.rms_norm)(x, shape, eps=info.eps)
        real = real_rows(model, name, current, y.shape[: -len(shape)])
        y = y if real is None else y[real]
        if not y.numel():
            return
        if not bool(y.isfinite().all()):
            raise ValueError(f"{name} met NaN or infinity on these batches: look at the weights and the inputs first")
        seen = found.setdefault(name, [-math.inf, math.inf, 0.0, 0.0, 0.0])
        seen[:2] = max(seen[0], float(y.max())), min(seen[1], float(y.min()))
        seen[2] += float((y > 0.5 / k).sum())
        seen[3] += float((y > 1 / k).sum())
        seen[4] += y.numel()

    hooks = (
        module.register_forward_pre_hook(lambda _, args, name=name, info=info: watch(name, info, args[0]))
        for name, module, info in norms
    )
    with hooked(hooks), evaluating(model):
        for batch in tqdm(batches, desc="calibrating", unit="batch", **SLOW_BAR):
            if not isinstance(batch, Mapping):
                raise TypeError(f"a batch must be {{argument name: tensor, ...}}, got {type(batch).__name__}")
            current = batch
            model(**batch)
    if not current:
        raise ValueError("batches is empty: calibrate_k needs at least one batch of real data")
    if not found:
        raise ValueError(f"no norm of {type(model).__name__} ran on these batches")
    ranges = (
        NormRange(
            name=name,
            largest=high,
            smallest=low,
            share_falling=falling / entries,
            share_negative=negative / entries,
            k=min(k, margin / max(abs(high), abs(low), 1e-12)),
        )
        for name, (high, low, falling, negative, entries) in found.items()
    )
    return KReport(tuple(ranges), k)
