"""What chooses checkpoints and hyper-parameters."""

from types import SimpleNamespace

import pytest

from tasks.bytes import ByteTask
from tasks.translation import TranslationTask


@pytest.mark.parametrize(
    ("task", "options", "expected"),
    [
        (TranslationTask, {"best_metric": "sacrebleu"}, ("sacrebleu", True)),
        (TranslationTask, {"best_metric": "loss"}, ("loss", False)),
        (TranslationTask, {}, (TranslationTask.score, True)),
        (ByteTask, {}, (ByteTask.score, False)),
    ],
)
def test_the_selection_knows_its_direction(task, options, expected):
    assert task.selection(SimpleNamespace(**options)) == expected
