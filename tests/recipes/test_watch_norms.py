"""`--watch_norms` writes what the norms do to the trackers."""

import json

import pytest

import classification
from tests.recipes.tiny_configs import TINY_CLASSIFIER


def test_watching_reaches_the_tracker_once_for_each_watched_step(texts, tmp_path):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    config = {f"{split}_file": str(texts[split]) for split in ("train", "validation")}
    config |= {"model_config": TINY_CLASSIFIER, "max_length": 32, "max_steps": 12, "batch_size": 4}
    config |= {"gradient_accumulation_steps": 2, "watch_norms": 5, "report_to": ["tensorboard"]}
    (tmp_path / "own.yaml").write_text(json.dumps(config))
    classification.main(["--config", str(tmp_path / "own.yaml"), "--output_dir", str(tmp_path / "run")])
    [file] = (p for p in (tmp_path / "run").rglob("events.out.tfevents.*") if p.parent.name == "classification")
    events = accumulator.EventAccumulator(str(file))
    events.Reload()
    steps = [event.step for event in events.Scalars("norms/grad_input_var/bert.encoder.layer.0.output.LayerNorm")]
    assert steps == [1, 6, 11]
