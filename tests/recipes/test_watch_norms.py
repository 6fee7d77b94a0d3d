"""`--watch_norms` writes what the norms do to the trackers, and changes nothing else."""

import json

import pytest

import classification
from tests.recipes.tiny_configs import TINY_CLASSIFIER


def run(texts, folder, *more):
    config = {f"{split}_file": str(texts[split]) for split in ("train", "validation")}
    config |= {
        "model_config": TINY_CLASSIFIER,
        "max_length": 32,
        "max_steps": 12,
        "batch_size": 4,
    }
    path = folder.with_suffix(".yaml")
    path.write_text(json.dumps({**config, "gradient_accumulation_steps": 2, "logging_steps": 5}))
    classification.main(["--config", str(path), "--output_dir", str(folder), *more])
    return json.loads((folder / "results.json").read_text())


def test_watching_reaches_the_tracker_and_leaves_the_training_alone(texts, tmp_path):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    plain = run(texts, tmp_path / "plain")
    watched = run(texts, tmp_path / "watched", "--watch_norms", "5", "--report_to", "[tensorboard]")
    assert watched["history"] == plain["history"]
    (file,) = (p for p in (tmp_path / "watched").rglob("events.out.tfevents.*") if p.parent.name == "classification")
    events = accumulator.EventAccumulator(str(file))
    events.Reload()
    steps = [event.step for event in events.Scalars("norms/grad_input_var/bert.encoder.layer.0.output.LayerNorm")]
    assert steps == [1, 6, 11]


def test_trackio_has_one_run_for_a_folder_without_a_network(texts, tmp_path, monkeypatch):
    """Needs `pip install trackio`, which no extra of ours brings."""
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    storage = pytest.importorskip("trackio.sqlite_storage").SQLiteStorage
    for name in ("a", "b", "b"):  # the second time, b is finished and stays as it is
        results = run(texts, tmp_path / name, "--report_to", "trackio")
    assert sorted(storage.get_runs("classification")) == ["a", "b"]
    logs = storage.get_logs("classification", "b")
    assert [entry["step"] for entry in logs if "train/loss" in entry] == [5, 10, 12]
    (score,) = [entry["validation/accuracy"] for entry in logs if "validation/accuracy" in entry]
    assert score == results["validation"]["accuracy"]
