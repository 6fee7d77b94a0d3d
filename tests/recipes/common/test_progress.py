"""How fast a run goes, and how it is shown."""

import time

from common.checkpoints import Progress
from common.progress import UNTIMED_STEPS, Stopwatch


def test_speed_leaves_out_the_first_steps_and_pauses():
    progress = Progress()
    watch = Stopwatch(progress)
    for _ in range(UNTIMED_STEPS):
        watch.step(8)
    assert watch.samples_per_second is None
    watch.pause()
    time.sleep(0.2)
    watch.resume()
    time.sleep(0.01)
    watch.step(8)
    assert (progress.samples, progress.timed_samples) == (8 * (UNTIMED_STEPS + 1), 8)
    assert 0.01 <= progress.timed_seconds < 0.2
