"""The figures of the paper's tables, from `paper.yaml`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from hf_adanorm import norms

_PAPER: dict[str, Any] = yaml.safe_load(Path(__file__).with_suffix(".yaml").read_text(encoding="utf-8"))
BASELINE = "layernorm"
ROWS: list[str] = _PAPER["rows"]
COLUMNS: dict[str, dict[str, Any]] = _PAPER["columns"]
CONFIGS: dict[str, list[str]] = _PAPER["configs"]
# Every norm's name for people, those of the paper first.
TITLES = {norm: norms.TITLES[norm] for norm in dict.fromkeys([*ROWS, *norms.TITLES])}


def margin(score: str, column: str | None) -> float:
    """Return the equivalence margin of a score in a column."""
    margins: dict[str, float] = _PAPER["margins"]
    return margins.get(column or "", margins[score])


def figure(column: str, norm: str) -> float | None:
    """Return the paper's figure, or None for a norm that diverged or is not in the paper."""
    return dict(zip(ROWS, COLUMNS[column]["scores"], strict=True)).get(norm)


def paper_score(column: str, norm: str) -> str:
    """Return the paper's figure as printed there, "diverges" where it has none, "-" for a norm that is not in it."""
    value = figure(column, norm)
    if value is None:
        return "diverges" if norm in ROWS else "-"
    return f"{value:.1f}" if COLUMNS[column]["metric"] == "BLEU" else f"{value:.2f}"
