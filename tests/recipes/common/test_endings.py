"""What one process of a run cannot go on with ends all of them, with its message and code."""

import re
import time

import pytest

from common.checkpoints import EXIT_CANNOT_SAVE
from tests.recipes.fault_runs import arguments
from tests.recipes.recipe_process import two_processes


@pytest.mark.parametrize("alone", [0, 1])
def test_what_one_process_alone_cannot_read_ends_both_with_its_message(alone, data, tmp_path):
    argvs = [arguments("classification", data, tmp_path / "run") for _ in range(2)]
    argvs[alone][argvs[alone].index("--validation_file") + 1] = str(data / "absent.jsonl")
    started = time.monotonic()
    codes, said = two_processes("classification", argvs, tmp_path)
    assert codes == [2, 2], said
    assert time.monotonic() - started < 30
    assert re.search(r"error: (process 1: )?--validation_file .*absent.jsonl: no such file", said[0]), said
    assert "Traceback" not in said[0] + said[1]


def test_an_exception_that_nobody_expects_in_one_process_ends_both(data, tmp_path):
    argv = arguments("classification", data, tmp_path / "run")
    codes, said = two_processes(
        "classification", [argv, argv], tmp_path, raise_at=[("open", r"\.tmp-checkpoint-4/"), None]
    )
    assert codes == [1, 1], said
    assert "error: RuntimeError: the tokens have run out" in said[0]
    assert "Traceback" not in said[1]  # it was told, and not left with a connection that broke


def test_a_disk_that_is_full_for_the_main_process_ends_both_with_its_code(data, tmp_path):
    argv = arguments("classification", data, tmp_path / "run")
    codes, said = two_processes("classification", [argv, argv], tmp_path, file_size=[20_000, None])
    assert codes == [EXIT_CANNOT_SAVE] * 2, said
    assert "checkpoint-4 cannot be written" in said[0]
    assert "Traceback" not in said[0] + said[1]
