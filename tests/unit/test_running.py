"""A model run once: its dummy inputs, and which rows of them are padding."""

from __future__ import annotations

import pytest
import torch

from hf_adanorm.running import dummy_inputs, real_rows
from tests.zoo import todays_models
from tests.zoo.fold_models import build


def test_padding_of_the_decoder_is_told_by_its_own_mask() -> None:
    model = build("bart")
    ids, mask = torch.randint(4, 20, (2, 8)), torch.ones(2, 8, dtype=torch.int64)
    mask[0, 5:] = 0
    inputs = {"input_ids": ids, "attention_mask": mask, "decoder_input_ids": ids}
    assert real_rows(model, "model.encoder.layernorm_embedding", inputs, (2, 8)).sum() == 13
    assert real_rows(model, "model.decoder.layernorm_embedding", inputs, (2, 8)) is None
    inputs["decoder_attention_mask"] = torch.flip(mask, [0])
    assert real_rows(model, "model.decoder.layernorm_embedding", inputs, (2, 8))[0].all()
    assert real_rows(model, "model.decoder.layernorm_embedding", inputs, (2, 7)) is None


@pytest.mark.parametrize("name", ["videomae", "vilt"])
def test_video_and_image_masks_are_among_the_dummy_inputs(name: str) -> None:
    inputs = dummy_inputs(build(name))
    assert inputs["pixel_values"].ndim == 5 or not bool(inputs["pixel_mask"].all())


@pytest.mark.parametrize(("model_type", "name"), [("siglip2", "spatial_shapes"), ("qwen2_5_vl", "input_ids")])
def test_ragged_images_and_text_alone_are_among_the_dummy_inputs(model_type: str, name: str) -> None:
    assert name in dummy_inputs(todays_models.build(model_type)[0])
