"""Translating a file with a saved model, by the stock API."""

import gzip
import sys

import pytest
import torch
from transformers import AutoConfig, AutoModelForSeq2SeqLM

import translate
from hf_adanorm import patch_model
from tasks.joint_bpe import train_joint_bpe
from tests.recipes.tiny_configs import TINY_TRANSLATOR

TEXTS = ["a b c", "b", "", "c c a b b a c"]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    tokenizer = train_joint_bpe(TEXTS * 3, vocab_size=30, lowercase=False, max_length=20)
    tokenizer.save_pretrained(folder)
    torch.manual_seed(2)
    # Weights so large, and a head of its own, that what comes out depends on what goes in.
    sizes = {**TINY_TRANSLATOR, "init_std": 1.0, "tie_word_embeddings": False}
    config = AutoConfig.for_model(**sizes, vocab_size=len(tokenizer), decoder_start_token_id=2)
    model = patch_model(AutoModelForSeq2SeqLM.from_config(config), "adanorm")
    model.generation_config.max_length = 6
    model.save_pretrained(folder)
    return str(folder)


def run(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["translate.py", *map(str, arguments)])
    translate.main()


def test_every_line_has_its_translation_whatever_the_batch(model, tmp_path, monkeypatch):
    with gzip.open(tmp_path / "in.gz", "wt", encoding="utf-8-sig", newline="") as file:
        file.write("\r\n".join(TEXTS) + "\r\n")
    run(monkeypatch, "--model", model, "--input", tmp_path / "in.gz", "--output", tmp_path / "out", "--batch_size", 2)
    found = (tmp_path / "out").read_text().removesuffix("\n").split("\n")
    assert found == [translate.translate_texts(model, [text], 1, "no")[0] for text in TEXTS]
    assert len(set(found)) > 2


def test_a_prefix_stands_before_every_sentence(model, tmp_path, monkeypatch):
    (tmp_path / "in").write_text("\n".join(TEXTS))
    files = ("--model", model, "--input", tmp_path / "in", "--output", tmp_path / "out")
    run(monkeypatch, *files, "--source_prefix", "b a ")
    found = (tmp_path / "out").read_text().removesuffix("\n").split("\n")
    assert found == translate.translate_texts(model, ["b a " + text for text in TEXTS], 8, "no")
    assert found != translate.translate_texts(model, TEXTS, 8, "no")


@pytest.mark.parametrize(
    ("content", "options", "said"),
    [
        (b"\n\n", (), "in is empty"),
        (None, (), "in: no such file"),
        ("Straße\n".encode("latin-1"), (), "in is not UTF-8"),
        (b"a b\n", ("--source_lang_code", "deu_Latn"), "takes no source language"),
    ],
)
def test_bad_input_ends_in_one_line(content, options, said, model, tmp_path, monkeypatch, capsys):
    if content is not None:
        (tmp_path / "in").write_bytes(content)
    with pytest.raises(SystemExit, match="2"):
        run(monkeypatch, "--model", model, "--input", tmp_path / "in", "--output", tmp_path / "out", *options)
    assert said in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
