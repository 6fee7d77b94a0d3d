"""`--watch_norms` writes what the norms do to the trackers, and changes nothing else."""

import json

import pytest

import classification
from tests.recipes.tiny_configs import TINY_CLASSIFIER


def run(texts, folder, *more):
    config = {f"{split}_file": str(path) for split, path in texts.items()}
    config |= {
        "model_config": TINY_CLASSIFIER,
        "max_length": 32,
        "max_steps": 12,
        "batch_size": 4,
        "progress_bar": False,
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


def test_zero_is_refused(texts, tmp_path):
    with pytest.raises(SystemExit) as end:
        run(texts, tmp_path / "zero", "--watch_norms", "0")
    assert end.value.code == 2
