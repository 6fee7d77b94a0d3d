"""Sentence pairs to a task: sums of scores, decoder inputs, initialization."""

import json

import pytest
from transformers import AutoConfig, AutoModelForSeq2SeqLM

from comparison.records import Run
from tasks.bleu import translation_scores
from tasks.translation import TranslationTask, initialize
from tests.recipes.tiny_configs import TINY_TRANSLATOR


def test_bleu_is_computed_from_sums_as_sacrebleu_does(tmp_path):
    pairs = [
        ("The black cat sat on the mat today.", "A black cat sat on the mat."),
        ("He went home & slept.", "He went home and slept well."),
        ("It rains in the hills of the north.", "It rains in the hills of the north."),
    ]
    rows = [{"source": "", "reference": reference, "translation": hypothesis} for hypothesis, reference in pairs]
    (tmp_path / "test_translations.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")
    (tmp_path / "results.json").write_text(json.dumps({"options": {"target_lang": "en"}}))
    rows, score = TranslationTask.outcomes(tmp_path, Run("adanorm", 1, tmp_path).record), TranslationTask.score_of
    expected, _ = translation_scores(*map(list, zip(*pairs, strict=True)), "en")
    assert score(rows.sum(0, keepdims=True))[0] == pytest.approx(expected["bleu_tokenized_lowercase"])
    assert score(2 * rows[2:])[0] == pytest.approx(100)


def test_initialization_is_that_of_the_papers_runs():
    width = 64
    config = AutoConfig.for_model(
        **{**TINY_TRANSLATOR, "d_model": width, "encoder_ffn_dim": 96, "vocab_size": 500, "encoder_attention_heads": 4}
    )
    model = AutoModelForSeq2SeqLM.from_config(config)
    initialize(model, "kaiming")
    layer = model.model.encoder.layers[0]
    for module in (layer.self_attn.q_proj, layer.self_attn.v_proj, layer.self_attn.out_proj):
        assert 0.95 * width**-0.5 < module.weight.abs().max() <= width**-0.5
        assert module.bias.abs().max() == 0
    bound = (6 / (width + 96)) ** 0.5
    assert 0.95 * bound < layer.fc1.weight.abs().max() <= bound
    assert model.get_input_embeddings().weight.std().item() == pytest.approx(width**-0.5, rel=0.05)
    assert model.get_input_embeddings().weight[1].abs().max() == 0  # padding
    assert model.lm_head.weight.data_ptr() == model.get_input_embeddings().weight.data_ptr()
    initialize(model, "xavier")
    bound = (6 / (4 * width)) ** 0.5
    assert 0.95 * bound < layer.self_attn.q_proj.weight.abs().max() <= bound
