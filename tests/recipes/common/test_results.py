"""The table of finished runs."""

import json
import sys

import pytest

from common import results

RUN = {"norm": "adanorm", "seed": 3, "norm_modules": 5, "parameters": 12345, "steps": 60, "test": None}
RUN |= {"validation": {"accuracy": 50.0}, "train_samples_per_second": 1234.5}
RUN |= {"metric": {"score": "accuracy", "label": "accuracy (%)", "scale": 1.0, "decimals": 2}}


def test_a_line_a_run_with_the_metric_of_its_recipe():
    control = {**RUN, "norm": "layernorm", "test": {"accuracy": 25.0}, "train_samples_per_second": None}
    head, _, first, second = results.format_results([RUN, control]).splitlines()
    assert "validation accuracy (%)" in head
    assert first.split() == ["adanorm", "3", "5", "12,345", "60", "50.00", "-", "1,234"]
    assert second.split() == ["layernorm", "3", "0", "12,345", "60", "50.00", "25.00", "-"]
    metric = {"score": "bits", "label": "bits", "scale": 1.0, "decimals": 3}
    table = results.format_results([{**RUN, "metric": metric, "validation": {"bits": 1.25}}])
    assert "1.250" in table


def test_a_run_that_has_not_finished_is_named(tmp_path, monkeypatch, capsys):
    (tmp_path / "done").mkdir()
    (tmp_path / "done" / "results.json").write_text(json.dumps(RUN))
    monkeypatch.setattr(sys, "argv", ["results.py", str(tmp_path / "done")])
    results.main()
    assert "adanorm" in capsys.readouterr().out
    monkeypatch.setattr(sys, "argv", [*sys.argv, str(tmp_path / "other")])
    with pytest.raises(SystemExit, match=r"other/results\.json: the run in this folder has not finished"):
        results.main()


def test_the_versions_are_those_that_are_installed():
    assert results.versions()["python"] == sys.version.split()[0]
    assert {"hf-adanorm", "torch", "transformers", "accelerate", "datasets"} <= results.versions().keys()
