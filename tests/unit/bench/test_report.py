"""What the benchmark writes."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("matplotlib")

from hf_adanorm.bench import report, timing

CPU = torch.device("cpu")


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
    figure = report.draw(measured, {"device": "cpu"})
    assert len(figure.axes) == 4
    for axis in figure.axes:
        labels = [label.get_text() for label in axis.get_xticklabels()]
        assert {"1", "10"} <= set(labels)
        assert not any("10^" in label for label in labels)
    colors = [{line.get_color() for line in axis.get_lines()} for axis in figure.axes]
    assert all(some <= colors[0] for some in colors)  # those of the legend come on top in the first


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
    report.write([result], tmp_path, CPU)
    first = (tmp_path / "bench.csv").read_text().splitlines()[1].split(",")[:7]
    report.write([result, result], tmp_path, CPU)
    assert len((tmp_path / "bench.csv").read_text().splitlines()) == 3
    assert first == ["op", "4x8", "float32", "eager", "forward", "layernorm", "0.001"]
