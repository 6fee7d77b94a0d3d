"""What a run cannot go on with, or is asked to stop in, is answered in seconds, by all of its processes."""

import json
import os
import re
import signal
import socket
import time

import pytest

from common.checkpoints import EXIT_CANNOT_SAVE, EXIT_RESUME
from tests.recipes.fault_runs import arguments, write_data
from tests.recipes.recipe_process import resumed_from, start, wait
from tests.recipes.tiny_configs import TINY_PARSER, TINY_TRANSFORMER_XL


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Once the server that processes are forked from has imported the recipes."""
    folder = tmp_path_factory.mktemp("data")
    assert wait(start("classification", ["--help"], folder / "log")) == 0
    return write_data(folder)


def two_processes(argvs, folder, recipe="classification", **faults):
    """Exit codes and outputs of two processes of one run, each with its own arguments and `faults`."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    common = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    logs = [folder / f"log{rank}" for rank in range(2)]
    processes = [
        start(
            recipe,
            argvs[rank],
            logs[rank],
            environment={**common, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            **{name: values[rank] for name, values in faults.items()},
        )
        for rank in range(2)
    ]
    return [wait(process) for process in processes], [log.read_text() for log in logs]


@pytest.mark.parametrize(
    ("recipe", "changes"),
    [
        ("parsing", {"model_config": json.dumps({**TINY_PARSER, "dropout": 0.0})}),
        ("language_modeling", {"model_config": json.dumps(TINY_TRANSFORMER_XL), "max_validation_samples": 20}),
    ],
)
def test_two_processes_do_what_one_does(recipe, changes, data, tmp_path):
    one = arguments(recipe, data, tmp_path / "one", **{**changes, "batch_size": 4, "eval_batch_size": 4})
    assert wait(start(recipe, one, tmp_path / "log")) == 0, (tmp_path / "log").read_text()
    two = arguments(recipe, data, tmp_path / "two", **{**changes, "batch_size": 2, "eval_batch_size": 2})
    codes, said = two_processes([two, two], tmp_path, recipe)
    assert codes == [0, 0], said
    results = [json.loads((tmp_path / name / "results.json").read_text()) for name in ("one", "two")]
    assert results[1]["num_processes"] == 2
    for left, right in zip(results[0]["history"], results[1]["history"], strict=True):
        assert right == pytest.approx(left, rel=1e-4)


@pytest.mark.parametrize("alone", [0, 1])
def test_what_one_process_alone_cannot_read_ends_both_with_its_message(alone, data, tmp_path):
    argvs = [arguments("classification", data, tmp_path / "run") for _ in range(2)]
    argvs[alone][argvs[alone].index("--validation_file") + 1] = str(data / "absent.jsonl")
    started = time.monotonic()
    codes, said = two_processes(argvs, tmp_path)
    assert codes == [2, 2], said
    assert time.monotonic() - started < 30
    assert re.search(r"error: (process 1: )?--validation_file .*absent.jsonl: no such file", said[0]), said
    assert "Traceback" not in said[0] + said[1]


def test_an_exception_that_nobody_expects_in_one_process_ends_both(data, tmp_path):
    argv = arguments("classification", data, tmp_path / "run")
    codes, said = two_processes([argv, argv], tmp_path, raise_at=[("open", r"\.tmp-checkpoint-4/"), None])
    assert codes == [1, 1], said
    assert "error: RuntimeError: the tokens have run out" in said[0]
    assert "Traceback" not in said[1]  # it was told, and not left with a connection that broke


def test_a_disk_that_is_full_for_the_main_process_ends_both_with_its_code(data, tmp_path):
    argv = arguments("classification", data, tmp_path / "run")
    codes, said = two_processes([argv, argv], tmp_path, file_size=[20_000, None])
    assert codes == [EXIT_CANNOT_SAVE] * 2, said
    assert "checkpoint-4 cannot be written" in said[0]
    assert "Traceback" not in said[0] + said[1]


def test_a_second_run_in_the_folder_is_refused_in_one_line_and_the_first_goes_on(data, tmp_path):
    argv = arguments("classification", data, tmp_path / "run", max_steps=10_000, eval_steps=10_000)
    first = start("classification", argv, tmp_path / "log1")
    while not (tmp_path / "run" / "checkpoint-4").exists() and first.is_alive():
        time.sleep(0.005)
    assert wait(start("classification", argv, tmp_path / "log2")) == 2
    said = (tmp_path / "log2").read_text()
    assert re.fullmatch(rf"error: --output_dir .*: another run, process {first.pid} on \S+, writes there; .*\n", said)
    assert first.is_alive()
    first.kill()
    assert wait(first) < 0
    third = start("classification", argv, tmp_path / "log3")  # the lock died with the first
    deadline = time.monotonic() + 60
    while not ((tmp_path / "log3").exists() and resumed_from(tmp_path / "log3")) and time.monotonic() < deadline:
        time.sleep(0.005)
    third.kill()
    wait(third)
    assert resumed_from(tmp_path / "log3") >= 4


@pytest.mark.parametrize("finished", [False, True])
def test_a_run_whose_data_has_changed_is_refused(finished, tmp_path):
    argv = arguments("classification", write_data(tmp_path), tmp_path / "run")
    kill = {} if finished else {"kill_at": ("open", r"\.tmp-checkpoint-8/")}
    wait(start("classification", argv, tmp_path / "log", **kill))
    path = tmp_path / "texts-validation.jsonl"
    before = path.stat()
    first, rest = path.read_text().split("\n", 1)
    path.write_text(json.dumps({**json.loads(first), "label": 1 - json.loads(first)["label"]}) + "\n" + rest)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert wait(start("classification", argv, tmp_path / "log")) == 2
    assert "on other data: what --validation_file names has changed since" in (tmp_path / "log").read_text()


def test_ctrl_c_in_the_middle_of_an_evaluation_is_answered_at_once(data, tmp_path):
    """The evaluation takes seconds; the resumed run does it first, and ends as if nothing had been."""
    text = tmp_path / "long.txt"
    text.write_bytes((data / "bytes-train.jsonl").read_bytes() * 40)
    changes = {"validation_file": text, "eval_batch_size": 1, "eval_stride": 1, "max_validation_samples": 600}
    changes |= {"max_steps": 4, "eval_steps": 2, "logging_steps": 2, "checkpointing_steps": "null"}
    runs = {name: arguments("language_modeling", data, tmp_path / name, **changes) for name in ("whole", "stopped")}
    assert wait(start("language_modeling", runs["whole"], tmp_path / "log")) == 0, (tmp_path / "log").read_text()
    log = tmp_path / "log2"
    process = start("language_modeling", runs["stopped"], log)
    while not (log.exists() and "step 2/4" in log.read_text()) and process.is_alive():
        time.sleep(0.005)
    time.sleep(0.2)
    asked = time.monotonic()
    os.kill(process.pid, signal.SIGINT)
    assert wait(process) == EXIT_RESUME, log.read_text()
    assert time.monotonic() - asked < 10
    assert "step 2: validation" not in log.read_text()
    assert re.search("stopped by Ctrl-C at step 2; start the same command to resume", log.read_text())
    assert wait(start("language_modeling", runs["stopped"], log)) == 0, log.read_text()
    whole, stopped = (json.loads((tmp_path / name / "results.json").read_text()) for name in runs)
    for key in ("validation", "history", "train_history", "best_step"):
        assert whole[key] == stopped[key]
