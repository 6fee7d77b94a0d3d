"""Configs of fresh models: what transformers takes is taken, what it would pass over in silence is refused."""

import dataclasses
from types import SimpleNamespace

import pytest
from transformers import BertConfig

from common.options import OptionError
from tasks.models import fresh_config


def config_of(**fields):
    return fresh_config(SimpleNamespace(model_config=fields), vocab_size=20)


def test_fields_that_only_the_models_code_reads_are_taken():
    assert config_of(model_type="deberta-v2", position_buckets=8).position_buckets == 8


def test_fields_that_become_others_are_taken():
    config = config_of(model_type="llama", rope_theta=5000.0)
    assert config.rope_parameters["rope_theta"] == 5000.0
    assert config_of(model_type="gpt2", hidden_size=8, num_attention_heads=2).n_embd == 8
    assert config_of(model_type="bert", attn_implementation="eager")._attn_implementation == "eager"


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"model_type": "bert", "hiden_size": 8}, "bert has no field 'hiden_size'; did you mean 'hidden_size'"),
        ({"model_type": "m2m_100", "d_modle": 8}, "no field 'd_modle'; did you mean 'd_model'"),
        ({"model_type": "bret"}, "no model_type 'bret'; did you mean"),
        ({"hidden_size": 8}, "needs a model_type"),
        ({"model_type": "bert", "num_hidden_layers": -1}, "num_hidden_layers must not be negative"),
        ({"model_type": "bert", "hidden_size": 1.5}, "Field 'hidden_size' expected int, got float"),
        ({"model_type": "bert", "vocab_size": 3}, "vocab_size 3 is less than the tokenizer's 20"),
    ],
)
def test_what_would_be_passed_over_is_refused(fields, said):
    if "expected int" in said and not dataclasses.is_dataclass(BertConfig):
        pytest.skip("transformers 5.0 does not check the types of fields")
    with pytest.raises(OptionError, match=said):
        config_of(**fields)
