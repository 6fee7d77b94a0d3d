"""The benchmark's statistics, its runs at tiny sizes, and what it refuses."""

from __future__ import annotations

import csv
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).parents[2] / "recipes"))
import benchmark

SCRIPT = Path(benchmark.__file__)


def test_the_interval_holds_the_median_in_95_of_100_samples() -> None:
    draw = torch.Generator().manual_seed(0)
    inside = 0
    for _ in range(2000):
        median, low, high = benchmark.interval(torch.rand(25, generator=draw).tolist())
        assert low <= median <= high
        inside += low <= 0.5 <= high
    assert 0.93 <= inside / 2000 <= 0.99


@pytest.mark.parametrize(
    ("low", "high", "said"), [(0.8, 1.02, "met"), (0.8, 1.03, ""), (1.02, 1.2, ""), (1.021, 1.2, "missed")]
)
def test_a_verdict_needs_the_whole_interval(low: float, high: float, said: str) -> None:
    assert benchmark.verdict(low, high, 1.0) == said


def test_turns_measure_the_ratio_of_what_is_called() -> None:
    def busy(milliseconds: float) -> Any:
        def call() -> None:
            end = time.process_time() + milliseconds / 1e3
            while time.process_time() < end:
                pass

        return call

    seconds, ratios = benchmark.take_turns(busy(3), busy(1), rounds=5, seconds=0.0)
    assert seconds == pytest.approx(3e-3, rel=0.5)
    assert len(ratios) == 5
    assert sorted(ratios)[2] == pytest.approx(3, rel=0.3)


def test_saved_bytes_leave_parameters_out_and_count_shared_storage_once() -> None:
    x = torch.randn(4, 8, requires_grad=True)
    assert benchmark.saved_bytes(nn.Linear(8, 8), x) == x.nbytes
    assert benchmark.saved_bytes(nn.LayerNorm(8), x) == x.nbytes + 2 * 4 * 4


def test_a_quick_run_measures_norms_and_models_and_writes_its_rows(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "mine.py").write_text(
        "from torch import nn\n\n\nclass Mine(nn.Module):\n"
        "    def __init__(self, normalized_shape, eps=1e-5, *, scale=1.0):\n"
        "        super().__init__()\n        self.scale = scale\n\n"
        "    def forward(self, x):\n        return self.scale * x\n"
    )
    norms = ["adanorm", f"{tmp_path}/mine.py:Mine:scale=2.0"]
    wanted = ["--what", "norms", "models", "--models", "gpt2", "llama", "--norms", *norms]
    file = tmp_path / "rows.csv"
    assert benchmark.main(["--quick", "--device", "cpu", *wanted, "--output", str(file)]) == 0
    rows = list(csv.DictReader(file.open()))
    assert {(row["case"], row["task"], row["norm"]) for row in rows} == {
        *(("32x64", task, norm) for task in ("inference", "training") for norm in norms),
        *((kind, task, norm) for kind in ("gpt2", "llama") for task in benchmark.TASKS for norm in norms),
    }
    assert all(float(row["low"]) <= float(row["ratio"]) <= float(row["high"]) for row in rows)
    assert {row["verdict"] for row in rows} == {""}
    assert {row["saved"] for row in rows if row["case"] == "gpt2"} == {""}
    assert len(capsys.readouterr().out.splitlines()) == 1 + len(rows)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--shapes", "512"], "rows x width, such as 512x768, got '512'"),
        (["--rounds", "5"], "--rounds must be >= 6, got 5"),
        (["--norms", "adanorn"], "did you mean 'adanorm'"),
        (["--device", "tpu0"], "error: "),
    ],
)
def test_bad_arguments(arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        sys.exit(benchmark.main(["--quick", *arguments]))
    assert ended.value.code == 2
    assert words in capsys.readouterr().err


def test_help_does_not_import_torch() -> None:
    code = (
        "import sys, runpy\ntry:\n    runpy.run_path(sys.argv[1], run_name='__main__')\nexcept SystemExit:\n    pass\n"
        "assert 'torch' not in sys.modules"
    )
    command = [sys.executable, "-c", code.replace("sys.argv[1]", repr(str(SCRIPT))), "--help"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "--quick" in done.stdout
