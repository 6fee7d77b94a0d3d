"""The benchmark: its arithmetic, its command, and what it writes."""

from __future__ import annotations

import csv
import math

import pytest
import torch
from torch import nn

pytest.importorskip("matplotlib")
pytest.importorskip("typer")

from hf_adanorm import AdaNorm, modeling_adanorm
from hf_adanorm.bench import contenders as bench_contenders
from hf_adanorm.bench import measure as bench
from hf_adanorm.bench import report as bench_report
from hf_adanorm.bench import timing
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


def test_the_picture_has_at_most_four_panels_whatever_was_measured():
    case = {
        "level": "op",
        "case": "4x8",
        "ratio_low": 0.5,
        "ratio_high": 20.0,
        "dtype": "float32",
        "seconds": 1e-3,
        "rounds": 5,
    }
    measured = [
        timing.Measurement(mode=mode, task=f"task {i}", norm=norm, ratio=ratio, **case)
        for mode in ("eager", "compiled")
        for i in range(6)
        for norm, ratio in (("layernorm", 1.0), ("adanorm", 0.9), ("adanorm-lancopku", 12.0))
    ]
    figure = bench_report.draw(measured, {"device": "cpu"})
    assert len(figure.axes) == 4
    for axis in figure.axes:
        labels = [label.get_text() for label in axis.get_xticklabels()]
        assert {"1", "10"} <= set(labels)
        assert not any("10^" in label for label in labels)
    colors = [{line.get_color() for line in axis.get_lines()} for axis in figure.axes]
    assert all(some <= colors[0] for some in colors)  # those of the legend come on top in the first


def test_table_and_plot(written, rows):
    text = (written / "bench.txt").read_text()
    for row in rows:
        assert row["norm"] in text
        assert row["case"] in text
    assert (written / "bench.png").read_bytes().startswith(b"\x89PNG")
    assert not [path for path in written.iterdir() if path.name.startswith(".")]


def test_the_written_out_formula_is_adanorm():
    x = torch.randn(5, 12, dtype=torch.float64, requires_grad=True)
    ours, written = AdaNorm(12, 1e-5)(x), bench_contenders.WrittenOut(1e-5)(x)
    torch.testing.assert_close(ours, written)
    torch.testing.assert_close(
        torch.autograd.grad(ours.pow(2).sum(), x)[0], torch.autograd.grad(written.pow(2).sum(), x)[0]
    )


def test_the_contender_on_torch_operators_does_not_use_the_loops(monkeypatch):
    seen = []
    monkeypatch.setattr(modeling_adanorm, "cpu_kernel", "loops")
    bench._on_torch(lambda: seen.append(modeling_adanorm.cpu_kernel))()
    assert seen == [None]
    assert modeling_adanorm.cpu_kernel == "loops"


@pytest.mark.parametrize("norm", ["rmsnorm", "adanorm-lancopku", "adanorm-written", "adanorm"])
@pytest.mark.parametrize("kind", bench_contenders.MODELS)
def test_models_with_every_norm_train(kind, norm):
    model, batch, num_tokens = bench_contenders.build_model(kind, bench_contenders.SIZES["tiny"])
    stock = bench_contenders.count_norms(model)
    model = bench_contenders.with_norm(model, norm)
    assert not any(isinstance(module, nn.LayerNorm) for module in model.modules())
    assert bench_contenders.count_norms(model) == stock > 0
    assert num_tokens > 0
    run = bench._Run(model, batch, CPU, torch.float32, "eager")
    before = {name: p.clone() for name, p in model.named_parameters()}
    run.train_step()
    assert any(not torch.equal(p, before[name]) for name, p in model.named_parameters())
    assert bench.peak_bytes(run.task("inference"), CPU) > 0


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


def test_an_unknown_model_is_named():
    with pytest.raises(ValueError, match="bert, gpt2, marian, vit, got 'resnet'"):
        bench_contenders.build_model("resnet", bench_contenders.SIZES["tiny"])


def test_report_of_nothing_measured_twice_is_the_same_file(tmp_path):
    result = timing.Measurement(
        level="op",
        case="4x8",
        dtype="float32",
        mode="eager",
        task="forward",
        norm="layernorm",
        seconds=1e-3,
        ratio=1.0,
        ratio_low=0.9,
        ratio_high=1.1,
        rounds=5,
    )
    bench_report.write([result], tmp_path, CPU)
    first = (tmp_path / "bench.csv").read_text().splitlines()[1].split(",")[:7]
    bench_report.write([result, result], tmp_path, CPU)
    assert len((tmp_path / "bench.csv").read_text().splitlines()) == 3
    assert first == ["op", "4x8", "float32", "eager", "forward", "layernorm", "0.001"]
