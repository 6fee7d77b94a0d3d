"""Interrupt runs: kill them at the worst moments, fill the disk, kill one of two processes, ask them to stop.

Then the same command resumes from the newest complete checkpoint and ends with the weights of an undisturbed run, bit
for bit.
"""

from __future__ import annotations

import os
import re
import signal
import time
from pathlib import Path

import pytest

from common.endings import EXIT_CANNOT_SAVE, EXIT_RESUME
from tests.recipes.fault_runs import EVERY, STEPS, arguments
from tests.recipes.recipe_process import (
    check_whole,
    read_results,
    resumed_from,
    same_weights,
    start,
    two_processes,
    wait,
)

pytestmark = pytest.mark.skipif(os.name != "posix", reason="signals and limits of POSIX")
LAST = f"checkpoint-{STEPS}"


@pytest.fixture(scope="module", params=["classification", "translation"])
def recipe(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def undisturbed(recipe: str, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("undisturbed")
    code = wait(start(recipe, arguments(recipe, data, folder / "run"), folder / "log"))
    assert code == 0, (folder / "log").read_text()
    return folder / "run"


def assert_ends_like(undisturbed: Path, recipe: str, data: Path, run: Path, log: Path, newest: int) -> None:
    assert wait(start(recipe, arguments(recipe, data, run), log)) == 0, log.read_text()
    assert resumed_from(log) == newest
    assert check_whole(run) == STEPS
    assert same_weights(run / LAST, undisturbed / LAST)
    ours, theirs = read_results(run), read_results(undisturbed)
    for key in ("validation", "history", "train_history", "best_step"):
        assert ours[key] == theirs[key], key
    assert not list(run.glob(".tmp-*"))


# (moment, the newest checkpoint that must be left); every kill hits a run that the one before has left behind.
MOMENTS = [
    (("open", r"\.tmp-checkpoint-8/\.tmp-progress"), EVERY),  # in the middle of a checkpoint
    (("open", r"\.tmp-checkpoint-8/model"), EVERY),  # written, not yet on the disk
    (("os.rename", r"\.tmp-checkpoint-8$"), EVERY),  # on the disk, not yet in its place
    (("os.rename", r"/checkpoint-4$"), 2 * EVERY),  # an old checkpoint loses its name before it is deleted
    (("open", r"\.tmp-best-11/config"), 2 * EVERY),  # in the middle of the best model
    (("open", r"\.tmp-results\.json"), STEPS),  # before a byte of the results is written
    (("os.rename", r"\.tmp-results\.json"), STEPS),  # results written, not yet in their place
]


def test_killed_while_something_is_written(recipe: str, data: Path, undisturbed: Path, tmp_path: Path) -> None:
    run, log, newest = tmp_path / "run", tmp_path / "log", 0
    # The code that writes is the same for all recipes. The state to resume from is not.
    for moment, left in MOMENTS if recipe == "translation" else MOMENTS[::4]:
        code = wait(start(recipe, arguments(recipe, data, run), log, kill_at=moment))
        assert code == -signal.SIGKILL, (moment, log.read_text())
        assert resumed_from(log) == newest, moment
        newest = check_whole(run)
        assert newest == left, moment
        assert not (run / "results.json").exists(), moment
    assert_ends_like(undisturbed, recipe, data, run, log, newest)


@pytest.mark.parametrize("recipe", ["translation"], indirect=True)
def test_a_full_disk_costs_no_checkpoint_that_stood(
    recipe: str, data: Path, undisturbed: Path, tmp_path: Path
) -> None:
    run, log = tmp_path / "run", tmp_path / "log"
    moment = ("os.rename", rf"\.tmp-checkpoint-{2 * EVERY}$")
    assert wait(start(recipe, arguments(recipe, data, run), log, kill_at=moment)) == -signal.SIGKILL
    size = (undisturbed / LAST / "optimizer.bin").stat().st_size
    code = wait(start(recipe, arguments(recipe, data, run), log, file_size=size // 2))
    assert code not in (0, EXIT_RESUME)
    said = log.read_text()
    assert re.search(r"error: .*checkpoint-8 cannot be written.*checkpoint-4 is intact", said), said
    assert check_whole(run) == EVERY
    assert not list(run.glob(".tmp-*"))  # half a checkpoint does not fill the disk further
    assert_ends_like(undisturbed, recipe, data, run, log, EVERY)


@pytest.mark.parametrize("recipe", ["translation"], indirect=True)
def test_a_disk_that_is_full_at_the_end_costs_nothing_trained(
    recipe: str, data: Path, undisturbed: Path, tmp_path: Path
) -> None:
    run, log = tmp_path / "run", tmp_path / "log"
    moment = ("os.rename", r"\.tmp-results\.json")
    assert wait(start(recipe, arguments(recipe, data, run), log, kill_at=moment)) == -signal.SIGKILL
    for path in run.glob(".tmp-*"):
        path.unlink()
    # What was trained is there; the results, and a translation's last model, which are larger, are still to come.
    limit = (undisturbed / "results.json").stat().st_size // 2
    code = wait(start(recipe, arguments(recipe, data, run), log, file_size=limit))
    said = log.read_text()
    assert code == EXIT_CANNOT_SAVE, said
    assert re.search(r"error: .*make room", said), said
    assert not (run / "results.json").exists()
    assert_ends_like(undisturbed, recipe, data, run, log, STEPS)


@pytest.mark.parametrize("recipe", ["translation"], indirect=True)
def test_sigterm_saves_and_asks_to_be_resumed(recipe: str, data: Path, undisturbed: Path, tmp_path: Path) -> None:
    run, log = tmp_path / "run", tmp_path / "log"
    process = start(recipe, arguments(recipe, data, run), log)
    while not (run / f"checkpoint-{EVERY}").exists() and process.is_alive():
        time.sleep(0.005)
    os.kill(process.pid, signal.SIGTERM)
    assert wait(process) == EXIT_RESUME, log.read_text()
    newest = check_whole(run)
    assert EVERY <= newest < STEPS
    assert_ends_like(undisturbed, recipe, data, run, log, newest)


def test_one_of_two_processes_dies(data: Path, tmp_path: Path) -> None:
    whole, run = (arguments("classification", data, tmp_path / name) for name in ("whole", "run"))
    codes, said = two_processes("classification", whole, tmp_path)
    assert codes == [0, 0], said
    codes, said = two_processes("classification", run, tmp_path, kill_when=tmp_path / "run" / ".tmp-checkpoint-8")
    assert codes[1] == -signal.SIGKILL, said
    assert codes[0] != 0  # the other does not wait for it for ever
    newest = check_whole(tmp_path / "run")
    assert newest in (EVERY, 2 * EVERY)
    codes, said = two_processes("classification", run, tmp_path)
    assert codes == [0, 0], said
    assert resumed_from(tmp_path / "log0") == newest
    assert same_weights(tmp_path / "run" / LAST, tmp_path / "whole" / LAST)
