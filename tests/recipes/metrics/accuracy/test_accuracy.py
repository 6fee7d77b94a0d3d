"""The metric that needs no network."""

from pathlib import Path

import evaluate
import pytest

import classification


def test_it_is_the_share_of_equal_answers():
    metric = evaluate.load(str(Path(classification.__file__).parent / "metrics" / "accuracy"))
    assert metric.compute(predictions=[0, 1, 2, 1], references=[0, 1, 1, 1]) == {"accuracy": pytest.approx(0.75)}
