"""The options of a fold are checked where they are given."""

from __future__ import annotations

from typing import Any

import pytest

from hf_adanorm import Fold


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"unfoldable": "calibrate"}, ValueError, "pass inputs"),
        ({"unfoldable": "aproximate"}, ValueError, "did you mean 'approximate'"),
        ({"tied": "cut"}, ValueError, r"tied must be one of \['keep', 'untie'\], got 'cut'"),
        ({"inputs": [1]}, TypeError, "inputs must map argument names"),
        ({"tolerance": -1.0}, ValueError, "finite number >= 0, got -1.0"),
        ({"tolerance": float("nan")}, ValueError, "finite number >= 0"),
        ({"tolerance": "1e-4"}, ValueError, "finite number >= 0"),
    ],
)
def test_bad_options_raise(options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        Fold(**options)
