"""Models saved by hf_adanorm 0.1.0, as it was before its code moved into sub-packages, load with the same bits."""

from __future__ import annotations

import json
import shutil
import warnings
from pathlib import Path

import pytest
import torch
import transformers
from packaging.version import Version
from safetensors.torch import load_file
from transformers import PreTrainedModel

from hf_adanorm.modeling_adanorm import is_swapped

pytestmark = pytest.mark.skipif(
    Version(transformers.__version__) < Version("5.23"), reason="transformers 5.23 wrote these checkpoints"
)

FOLDERS = sorted((Path(__file__).parent / "checkpoints").iterdir())
INPUTS = {
    "pixel_values": torch.linspace(-1, 1, 2 * 3 * 64).view(2, 3, 8, 8),
    "input_ids": torch.arange(10).view(2, 5),
    "decoder_input_ids": torch.tensor([[0, 1], [0, 2]]),
}


@pytest.fixture(params=FOLDERS, ids=lambda folder: folder.name)
def folder(request: pytest.FixtureRequest) -> Path:
    return request.param


def load(folder: Path) -> PreTrainedModel:
    return getattr(transformers, expected(folder)["class"]).from_pretrained(folder)


def expected(folder: Path) -> dict:
    """The class that was saved, and its output in eval mode when it was: logits, or the last hidden state."""
    return json.loads((folder / "expected.json").read_text())


def test_the_outputs_are_those_of_the_model_that_was_saved(folder: Path) -> None:
    model = load(folder).eval()
    names = {
        "ViTForImageClassification": ["pixel_values"],
        "T5ForConditionalGeneration": ["input_ids", "decoder_input_ids"],
    }.get(type(model).__name__, ["input_ids"])
    with torch.no_grad():
        output = model(**{name: INPUTS[name] for name in names})
    output = output.logits if "logits" in output else output.last_hidden_state
    torch.testing.assert_close(output.flatten(), torch.tensor(expected(folder)["output"]), atol=2e-6, rtol=1e-5)


def test_saving_again_writes_the_same_norms_and_the_same_weights(folder: Path, tmp_path: Path) -> None:
    load(folder).save_pretrained(tmp_path)
    before, after = (json.loads((place / "config.json").read_text())["adanorm"] for place in (folder, tmp_path))
    assert after["groups"] == before["groups"]
    assert after.get("biases") == before.get("biases")
    saved = load_file(tmp_path / "model.safetensors")
    for key, value in load_file(folder / "model.safetensors").items():
        assert torch.equal(saved[key], value), key


@pytest.fixture
def written_by_another_version(tmp_path: Path) -> Path:
    folder = shutil.copytree(Path(__file__).parent / "checkpoints" / "t5-none-encoder", tmp_path / "t5")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "transformers_version": "5.22.0"}))
    return folder


def test_the_names_of_one_part_are_not_taken_for_those_of_another(written_by_another_version: Path) -> None:
    swapped = [name for name, module in load(written_by_another_version).named_modules() if is_swapped(module)]
    assert {name.partition(".")[0] for name in swapped} == {"encoder"}


def test_nobody_is_warned_of_a_part_where_the_whole_has_every_name(written_by_another_version: Path) -> None:
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "config.adanorm")
        load(written_by_another_version)
