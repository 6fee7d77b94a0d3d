"""The benchmark: its arithmetic, its command, and what it writes."""

from __future__ import annotations

import csv
import math

import pytest
import torch

pytest.importorskip("matplotlib")
pytest.importorskip("typer")

from hf_adanorm import modeling_adanorm
from hf_adanorm.bench import contenders as bench_contenders
from hf_adanorm.bench import measure as bench
from hf_adanorm.cli import main

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """One quick run of the real command, without torch.compile (which would take most of the time)."""
    folder = tmp_path_factory.mktemp("bench")
    with pytest.raises(SystemExit) as end:
        main(["bench", "--output-dir", str(folder), "--mode", "eager", "--device", "cpu", "--threads", "1", "--quick"])
    assert end.value.code == 0
    return folder


@pytest.fixture(scope="module")
def rows(written):
    return list(csv.DictReader((written / "bench.csv").open()))


def test_every_contender_is_measured_at_every_level(rows):
    at = {level: {row["norm"] for row in rows if row["level"] == level} for level in bench.LEVELS}
    assert at["op"] == set(bench_contenders.contenders(8, torch.float32))
    assert at["model"] == at["op"] - {"adanorm-torch"}
    assert at["patch"] == {"layernorm", "adanorm"}
    tasks = {(row["level"], row["task"]) for row in rows}
    assert {("op", "forward"), ("op", "forward+backward"), ("model", "training step"), ("model", "inference")} <= tasks
    assert {("patch", "save_pretrained"), ("patch", "from_pretrained")} <= tasks


def test_figures_are_finite_and_ratios_lie_within_their_quartiles(rows):
    for row in rows:
        low, ratio, high = (float(row[key]) for key in ("ratio_low", "ratio", "ratio_high"))
        assert float(row["seconds"]) > 0
        assert math.isfinite(high)
        assert low <= ratio <= high
        assert (row["threads"], row["torch"]) == ("1", torch.__version__)
        if row["level"] == "model":
            assert float(row["tokens_per_second"]) > 0


def test_fewer_parameters_and_no_more_memory(rows):
    model = {row["norm"]: row for row in rows if row["level"] == "model" and row["task"] == "training step"}
    assert int(model["adanorm"]["parameters"]) < int(model["layernorm"]["parameters"])
    assert len({row["modules"] for row in model.values()}) == 1
    assert int(model["adanorm"]["modules"]) > 0
    op = {row["norm"]: int(row["bytes"]) for row in rows if row["level"] == "op" and row["task"] == "forward"}
    assert op["adanorm"] <= op["layernorm"] < op["adanorm-written"]


def test_table_and_plot(written, rows):
    text = (written / "bench.txt").read_text()
    for row in rows:
        assert row["norm"] in text
        assert row["case"] in text
    assert (written / "bench.png").read_bytes().startswith(b"\x89PNG")
    assert not [path for path in written.iterdir() if path.name.startswith(".")]


def test_the_contender_on_torch_operators_does_not_use_the_loops(monkeypatch):
    seen = []
    monkeypatch.setattr(modeling_adanorm, "cpu_kernel", "loops")
    bench._on_torch(lambda: seen.append(modeling_adanorm.cpu_kernel))()
    assert seen == [None]
    assert modeling_adanorm.cpu_kernel == "loops"


def test_compiled_operator_is_measured_for_all_row_counts():
    shapes = {"widths": (16,), "row_counts": (4, 8), "dtypes": (torch.float32,)}
    norms = ("layernorm", "adanorm", "adanorm-torch")
    results = bench.bench_operator(device=CPU, modes=("compiled",), norms=norms, rounds=2, min_seconds=0, **shapes)
    assert {(result.case, result.norm) for result in results} == {
        (case, norm) for case in ("4x16", "8x16") for norm in ("layernorm", "adanorm")
    }


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"levels": ["ops"]}, "levels must be of op, model, patch, got 'ops'"),
        ({"modes": ["jit"]}, "modes must be of"),
        ({"levels": []}, "levels is empty"),
        ({"threads": 0}, "threads must be >= 1"),
        ({"device": "cuda:99"}, "cuda:99"),
        ({"device": "meta"}, "CPU or a CUDA GPU"),
        ({"device": "toaster"}, "toaster"),
    ],
)
def test_bad_arguments_measure_nothing(tmp_path, arguments, words):
    with pytest.raises(ValueError, match=words):
        bench.run_bench(tmp_path / "out", **arguments)
    assert not (tmp_path / "out").exists()
