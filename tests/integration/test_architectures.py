"""Sweep model types that cover every formula of norm and every known hazard; the tests read the table.

`sweep.py` builds each tiny model, patches, runs, saves, loads it in another process by stock `from_pretrained`,
compares and unpatches. `test_saving.py` and `test_todays_models.py` do the same for the usual types.
"""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

STAGES = ("built", "forward before", "forward after", "backward", "saved", "round trip", "unpatch")

LAYERNORM = {
    "swin": "stages",
    "deberta": "custom LayerNorm, variance_epsilon, float32 inside",
    "convnext": "both layouts in one class",
    "eomt": "always channels first, four axes",
    "rf_detr": "channels first beside channels last in a detector",
    "squeezebert": "channels first, three axes",
    "cohere": "gain only",
    "nemotron": "gain offset and bias",
    "videoprism": "gain offset",
    "olmo": "no parameters, hard-coded eps",
    "moonshine_streaming": "a wrapper whose own gain stays",
    "autoformer": "a wrapper that subtracts the series mean",
    "stablelm": "bare LayerNorm beside RMS-like options",
    "patchtsmixer": "a wrapper that may hold a batch norm",
    "dbrx": "a block named like a norm that holds two",
    "blip-2": "reads a norm's weight.dtype from outside",
    "hiera": "its _init_weights looks for nn.LayerNorm",
    "wav2vec2": "group norm beside LayerNorm",
    "vision-encoder-decoder": "a model composed of two others",
    "qwen2_vl": "LayerNorm only in the vision tower of an RMSNorm model",
    "vivit": "does not reload bit for bit even unpatched",
    "roberta-prelayernorm": "layers named like norms",
    "esm": "LayerNorm after the stack",
}
RMSNORM = {"gemma": "gain offset", "t5": "called LayerNorm"}
EXPLAINED = {"ibert": "returns a tuple", "chameleon": "gain and bias per head"}


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, str]]:
    path = tmp_path_factory.mktemp("sweep") / "sweep.csv"
    script = Path(__file__).parents[1] / "campaigns" / "sweep.py"
    types = ",".join([*LAYERNORM, *RMSNORM, *EXPLAINED])
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(script), "--out", str(path), "--types", types]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    with path.open(newline="") as stream:
        return {row["model_type"]: row for row in csv.DictReader(stream)}


@pytest.mark.parametrize("model_type", [*LAYERNORM, *RMSNORM])
def test_comes_back_right(table: dict[str, dict[str, str]], model_type: str) -> None:
    """Forward, backward, save, stock load (weights, settings, outputs as the unpatched control), undo bit for bit."""
    row = table[model_type]
    assert not row["failed at"], f"{row['failed at']}: {row['reason']}"
    assert [row[stage] for stage in STAGES] == ["yes"] * len(STAGES)
    assert int(row["swapped"]) > 0
    assert row["changed"] == "yes"
    assert ("RMSNorm" if model_type in RMSNORM else "LayerNorm") in row["kinds"]


@pytest.mark.parametrize("model_type", [*LAYERNORM, *EXPLAINED])
def test_swapped_and_explained_norms_are_all_that_a_probe_of_the_model_finds(
    table: dict[str, dict[str, str]], model_type: str
) -> None:
    row = table[model_type]
    assert not row["missed"]
    assert int(row["counted"]) > 0
    assert int(row["swapped"] or 0) + int(row["explained"]) >= int(row["counted"])
    if model_type in EXPLAINED:
        assert int(row["explained"]) > 0


def test_every_formula_is_covered(table: dict[str, dict[str, str]]) -> None:
    found = {formula for row in table.values() for _, formula in json.loads(row["norms"])}
    layer, rms = "(x - mean) / sqrt(var + eps)", "x / sqrt(mean(x^2) + eps)"
    assert {
        f"w * {layer} + b",
        f"w * {layer} + b, channels first",
        f"w * {layer}",
        f"(1 + w) * {layer} + b",
        layer,
        f"w * {rms}",
        f"(1 + w) * {rms}",
    } <= found
    assert any(formula.startswith("skipped: a multi-head LayerNorm") for formula in found)
    assert any("scaling_factor" in formula for formula in found)
