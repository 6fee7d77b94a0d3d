"""Check how a log of norms prints."""

from __future__ import annotations

import dataclasses
import math

from hf_adanorm.diagnostics.log import FIELDS, NormLog, NormRecord


def log(*steps: int, norms: int = 1) -> NormLog:
    made = NormLog("Model", 1, 0.1)
    made.records = [
        NormRecord(step=step, name=f"n{i}", norm="adanorm", num_rows=1, **dict.fromkeys(FIELDS, math.pi))
        for step in steps
        for i in range(norms)
    ]
    return made


def test_one_is_not_many():
    assert str(log(1)).startswith("Model: 1 norm, 1 step recorded\n")
    assert str(log(1, 2, norms=2)).startswith("Model: 2 norms, 2 steps recorded (averages over steps)\n")
    assert str(log()) == "Model: 0 norms, 0 steps recorded"


def test_the_html_holds_all_numbers():
    records = log(1, 2, norms=2).records
    page = log(1, 2, norms=2)._repr_html_()
    assert page.count("3.14") == 2 * len(FIELDS)
    assert all(name in page for name in (*dataclasses.asdict(records[0]), "norm") if name in FIELDS)
