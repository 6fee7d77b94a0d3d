"""The study of pre-norm models that fold, at toy size."""

from __future__ import annotations

import gzip
import json
import sys
from pathlib import Path

import pytest

from studies import prenorm


def test_the_prenorm_study_folds_without_a_loss(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    text = tmp_path / "text.gz"
    text.write_bytes(gzip.compress(b"the quick brown fox jumps over the lazy dog. " * 200))
    sizes = ["--steps", 10, "--seeds", 1, "--width", 16, "--layers", 1, "--length", 16]
    sizes += ["--batch_size", 4, "--lr", 0.02]
    arguments = ["--text", text, "--output_dir", tmp_path / "out", *sizes]
    monkeypatch.setattr(sys, "argv", ["prenorm.py", *map(str, arguments)])
    prenorm.main()
    results = json.loads(next((tmp_path / "out").glob("results-*.json")).read_text())
    source = results["layernorm"]["after"]
    for way in ("fold layernorm-simple", "fold adanorm"):
        assert results[way]["after"] == pytest.approx(source, abs=1e-5)
    assert abs(results["drop adanorm"]["after"] - source) > 1e-4
    assert "| fold adanorm |" in capsys.readouterr().out
    assert (tmp_path / "out" / "loss.png").stat().st_size > 10_000
    assert not list((tmp_path / "out").glob(".tmp-*"))
