"""A saved model is loaded whole or not at all."""

import pytest
import torch
from transformers import AutoConfig, AutoModelForMaskedLM, AutoModelForSeq2SeqLM

from common.endings import DataError
from common.saved import load_saved
from hf_adanorm import patch_model
from tests.zoo.round_trip import tiny


def test_a_whole_model_is_loaded_bit_for_bit(tmp_path):
    model = patch_model(tiny())
    model.save_pretrained(tmp_path)
    loaded = dict(load_saved(AutoModelForMaskedLM, tmp_path).named_parameters())
    assert all(torch.equal(value, loaded[name]) for name, value in model.named_parameters())


def test_weights_that_would_be_left_at_chance_are_named(tmp_path):
    model = patch_model(tiny())
    model.save_pretrained(tmp_path, state_dict={f"_orig_mod.{name}": v for name, v in model.state_dict().items()})
    with pytest.raises(DataError, match=rf"{tmp_path} lacks \d+ weights of a BertFor\w+: bert.*, \.\.\."):
        load_saved(AutoModelForMaskedLM, tmp_path)


def test_a_model_of_another_kind_is_named_in_one_line(tmp_path):
    patch_model(tiny()).save_pretrained(tmp_path)
    with pytest.raises(DataError, match=r"AutoModelForSeq2SeqLM cannot load a BertForMaskedLM: [^\n]*$"):
        load_saved(AutoModelForSeq2SeqLM, tmp_path)


def test_positions_that_are_computed_need_not_be_saved(tmp_path):
    config = AutoConfig.for_model("pegasus", d_model=16, encoder_layers=1, decoder_layers=1, vocab_size=20)
    model = AutoModelForSeq2SeqLM.from_config(config)
    kept = {name: value for name, value in model.state_dict().items() if "embed_positions" not in name}
    model.save_pretrained(tmp_path, state_dict=kept)
    loaded = dict(load_saved(AutoModelForSeq2SeqLM, tmp_path).named_parameters())
    assert all(torch.equal(value, loaded[name]) for name, value in model.named_parameters())
