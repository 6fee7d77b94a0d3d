"""Where a fade of a run is, by the step alone."""

import pytest
from transformers import AutoModelForMaskedLM

from common.fade import fade, finish_saved_fade, is_fading
from common.options import PatchOptions
from hf_adanorm import patch_model
from tests.zoo.round_trip import tiny

OPTIONS = PatchOptions(affine="fade", fade_ratio=0.5)


def progress(model):
    return {float(buffer) for name, buffer in model.named_buffers() if name.endswith("fade_progress")}


def test_it_arrives_after_its_share_of_the_steps_and_stays():
    model = patch_model(tiny(), affine="fade")
    found = [(fade(model, step, 8, OPTIONS), progress(model)) for step in (0, 3, 4, 8)]
    assert found == [(False, {0.0}), (False, {0.75}), (True, {1.0}), (True, {1.0})]


@pytest.mark.parametrize("options", [{"norm": "layernorm"}, {"affine": "drop"}, {"affine": "fade"}])
def test_where_nothing_fades_it_has_arrived(options):
    model = tiny()
    assert not is_fading(model, PatchOptions(**options))
    assert fade(model, 0, 8, PatchOptions(**options))


def test_a_model_saved_at_the_end_becomes_a_plain_one_with_its_own_card(tmp_path):
    model = patch_model(tiny(), affine="fade")
    fade(model, 8, 8, OPTIONS)
    model.save_pretrained(tmp_path)
    assert "fade" in (tmp_path / "README.md").read_text()
    finish_saved_fade(tmp_path, AutoModelForMaskedLM)
    assert not progress(AutoModelForMaskedLM.from_pretrained(tmp_path))
    assert "fade" not in (tmp_path / "README.md").read_text()
