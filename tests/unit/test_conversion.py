"""A conversion keeps everything that belongs to a checkpoint, and invents no weights."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import AutoModelForSequenceClassification, BertConfig, BertForMaskedLM, BertForPreTraining

from hf_adanorm import is_patched
from hf_adanorm.cli import main
from hf_adanorm.conversion import copy_files
from tests.zoo.tiny_text import TEXTS, make_tokenizer

SIZES = {
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 16,
    "vocab_size": 64,
}


def convert(*arguments: str | Path) -> int:
    with pytest.raises(SystemExit) as ended:
        main(list(map(str, arguments)))
    return int(ended.value.code or 0)


@pytest.fixture
def with_pooler(tmp_path: Path) -> Path:
    """A checkpoint with the weights of BertForPreTraining whose config names BertForMaskedLM, as bert-base-uncased."""
    folder = tmp_path / "source"
    BertForPreTraining(BertConfig(**SIZES)).save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "architectures": ["BertForMaskedLM"]}))
    return folder


def test_weights_that_the_class_does_not_use_are_carried_along(with_pooler: Path, tmp_path: Path) -> None:
    assert convert("patch", with_pooler, tmp_path / "out") == 0
    before, after = (load_file(folder / "model.safetensors") for folder in (with_pooler, tmp_path / "out"))
    for key in ("bert.pooler.dense.weight", "bert.pooler.dense.bias", "cls.seq_relationship.weight"):
        assert torch.equal(after[key], before[key])
    classifier = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out")
    assert is_patched(classifier)
    assert torch.equal(classifier.bert.pooler.dense.weight, before["bert.pooler.dense.weight"])
    assert type(transformers.AutoModelForMaskedLM.from_pretrained(tmp_path / "out")) is BertForMaskedLM


def test_a_fold_refuses_weights_that_may_read_a_folded_norm(
    with_pooler: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert convert("fold", with_pooler, tmp_path / "out") == 2
    assert "bert.pooler.dense.weight" in (message := capsys.readouterr().err)
    assert "--architecture CLASS" in message
    assert convert("fold", with_pooler, tmp_path / "out", "--architecture", "BertForPreTraining") == 0


def test_weights_that_are_missing_are_named_and_nothing_is_written(
    with_pooler: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    weights = load_file(with_pooler / "model.safetensors")
    query = "bert.encoder.layer.0.attention.self.query.weight"
    norms = {key for key in weights if re.search(r"LayerNorm\.(weight|bias)", key)}  # they start from 1 and 0
    kept = {key: value for key, value in weights.items() if key not in {query, *norms}}
    save_file(kept, with_pooler / "model.safetensors", {"format": "pt"})
    assert convert("patch", with_pooler, tmp_path / "out") == 2
    assert f"lacks weights that BertForMaskedLM needs, which would be random: {query}." in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    save_file({**kept, query: weights[query]}, with_pooler / "model.safetensors", {"format": "pt"})
    assert convert("patch", with_pooler, tmp_path / "out") == 0
    assert convert("patch", with_pooler, tmp_path / "more", "--architecture", "BertForFun") == 2
    assert "BertForFun is not a model class of transformers" in capsys.readouterr().err


def test_a_sentence_transformers_folder_stays_one(tmp_path: Path) -> None:
    library = pytest.importorskip("sentence_transformers")
    modules = pytest.importorskip("sentence_transformers.models")
    transformers.BertModel(BertConfig(**SIZES)).save_pretrained(tmp_path / "bert")
    make_tokenizer().save_pretrained(tmp_path / "bert")
    parts = [modules.Transformer(str(tmp_path / "bert")), modules.Pooling(16, "max"), modules.Dense(16, 8)]
    parts.append(modules.Normalize())
    model = library.SentenceTransformer(modules=parts, prompts={"query": "the "}, device="cpu")
    model.save(str(tmp_path / "source"))
    assert convert("patch", tmp_path / "source", tmp_path / "out", "--norm", "layernorm-simple") == 0
    again = library.SentenceTransformer(str(tmp_path / "out"), device="cpu")
    assert is_patched(again)
    assert [type(module) for module in again] == [type(module) for module in model]
    assert again.prompts["query"] == "the "
    # fresh gains and biases are 1 and 0: the same function
    assert abs(again.encode(TEXTS) - model.encode(TEXTS)).max() < 1e-5


def test_every_file_that_a_tokenizer_of_transformers_consists_of_is_copied(tmp_path: Path) -> None:
    sources = Path(transformers.__file__).parent.glob("models/*/tokenization_*.py")
    table = re.compile(r"^ *(?:VOCAB_FILES_NAMES|vocab_files_names) = (\{.*?\})", re.MULTILINE | re.DOTALL)
    tables = [found for path in sources for found in table.findall(path.read_text())]
    names = {name for found in tables for name in re.findall(r': "([^"]+)"', found)}
    assert {"source.spm", "vocab.txt", "bpe.codes", "entity_vocab.json"} < names
    names |= {"additional_chat_templates/rag.jinja", "speaker_embeddings/v2/en.npz", "language_model/5gram.bin"}
    weights = {"model.safetensors", "pytorch_model.bin", "onnx/model.onnx", "checkpoint-1/tokenizer.json"}
    for name in (
        names | weights | {"tokenizer_code.py", "trainer_state.json", "config.json", "../elsewhere/secret.jinja"}
    ):
        (tmp_path / "source" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "source" / name).write_text(name)
    (tmp_path / "source" / "linked_templates").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "source" / "vocab.extra").symlink_to(tmp_path / "elsewhere" / "secret.jinja")
    (tmp_path / "source" / "vocab.same").symlink_to("vocab.txt")
    (tmp_path / "out").mkdir()
    with pytest.warns(UserWarning, match=r"lead out of the folder: .*linked_templates, .*vocab\.extra"):
        assert copy_files(str(tmp_path / "source"), None, tmp_path / "out") == ["tokenizer_code.py"]
    copied = {path: path.read_text() for path in (tmp_path / "out").rglob("*") if path.is_file()}
    assert copied == {tmp_path / "out" / name: name for name in names} | {tmp_path / "out" / "vocab.same": "vocab.txt"}
