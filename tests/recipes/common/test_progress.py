"""How fast a run goes, and how it is shown."""

import itertools
import re
import time

import pytest

from common.checkpoints import Progress
from common.progress import UNTIMED_STEPS, Stopwatch, time_left, with_time_left


def test_speed_leaves_out_the_first_steps_and_pauses(monkeypatch):
    clock = itertools.count()
    monkeypatch.setattr(time, "perf_counter", lambda: next(clock))
    progress = Progress()
    watch = Stopwatch(progress)
    for _ in range(UNTIMED_STEPS):
        watch.step(8)
    assert watch.samples_per_second is None
    watch.pause()
    for _ in range(20):
        time.perf_counter()
    watch.resume()
    watch.step(8)
    assert (progress.samples, progress.timed_samples) == (8 * (UNTIMED_STEPS + 1), 8)
    assert progress.timed_seconds == 1


@pytest.mark.parametrize(("seconds", "said"), [(0.4, "0:00 left"), (200, "3:20 left"), (7400, "2:03:20 left")])
def test_time_left_in_hours_where_there_are_any(seconds, said):
    assert time_left(seconds) == said


def test_a_long_pass_says_how_far_it_is_and_a_short_one_nothing(capsys):
    assert list(with_time_left("abc", "evaluation", every=0)) == ["a", "b", "c"]
    lines = [re.sub(", about .* left", "", line) for line in capsys.readouterr().out.splitlines()]
    assert lines == ["evaluation: 1 of 3 batches", "evaluation: 2 of 3 batches"]
    for settings in ({}, {"every": 0, "shown": False}):
        assert list(with_time_left("abc", "evaluation", **settings)) == ["a", "b", "c"]
    assert capsys.readouterr().out == ""
