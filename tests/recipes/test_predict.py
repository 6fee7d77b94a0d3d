"""Predicting a file with a saved model, by the stock API."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from transformers import AutoModelForSequenceClassification, AutoTokenizer, BertConfig, ViTConfig, pipeline

import predict
from hf_adanorm import patch_model
from tasks.tokenization import train_encoder_tokenizer

ROWS = [("a b c a b", "c"), ("b", "a"), ("c c", "a b c c b a"), ("a", "b")]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    texts = [text for row in ROWS for text in row]
    options = {"vocab_size": 30, "min_frequency": 1, "lowercase": True, "max_length": 16}
    tokenizer = train_encoder_tokenizer(texts, kind="word", **options)
    tokenizer.save_pretrained(folder)
    torch.manual_seed(2)
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    config = BertConfig(vocab_size=len(tokenizer), num_labels=9, initializer_range=1.0, **sizes)
    patch_model(AutoModelForSequenceClassification.from_config(config), "adanorm").save_pretrained(folder)
    return folder


@pytest.mark.parametrize("columns", [["first"], ["first", "second"]])
def test_every_row_has_its_class_in_the_order_of_the_file_whatever_the_batch(
    model, columns, tmp_path, monkeypatch, capsys
):
    data = Dataset.from_list([dict(zip(("first", "second"), row, strict=True)) for row in ROWS])
    data.to_parquet(tmp_path / "data.parquet")
    argv = ["predict.py", "--model", model, "--data", tmp_path / "data.parquet", "--output", tmp_path / "out.json"]
    monkeypatch.setattr(sys, "argv", list(map(str, [*argv, "--batch_size", 3, "--columns", *columns])))
    predict.main()
    assert capsys.readouterr().out == f"wrote 4 predictions to {tmp_path / 'out.json'}\n"
    found = json.loads((tmp_path / "out.json").read_text())
    classify = pipeline("text-classification", str(model))
    for row, prediction in zip(ROWS, found, strict=True):
        (alone,) = classify([dict(zip(("text", "text_pair"), row[: len(columns)], strict=False))])
        assert prediction == {"label": alone["label"], "score": pytest.approx(alone["score"], rel=1e-5)}
    assert len({prediction["label"] for prediction in found}) > 1


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"data": "tabel.csv"}, "error: --data {tmp}/tabel.csv: no such file; did you mean table.csv?"),
        ({"columns": "text"}, "error: --columns 'text': the given split has no such column, only 'first', 'second'"),
        ({"model": "nowhere"}, "error: --model {tmp}/nowhere: "),
        ({"model": "vit"}, "error: --model {tmp}/vit: AutoModelForSequenceClassification cannot load a vit: Unrecog"),
    ],
)
def test_what_is_not_there_is_said_in_a_line(changes, said, model, tmp_path, monkeypatch, capsys):
    (tmp_path / "table.csv").write_text("first,second\na b,c\n")
    ViTConfig().save_pretrained(tmp_path / "vit")
    AutoTokenizer.from_pretrained(model).save_pretrained(tmp_path / "vit")
    given = {"model": model, "data": "table.csv", "columns": "first", "output": "out.json", **changes}
    paths = {name: value if name == "columns" else tmp_path / value for name, value in given.items()}
    monkeypatch.setattr(sys, "argv", ["predict.py", *(str(w) for n, v in paths.items() for w in (f"--{n}", v))])
    with pytest.raises(SystemExit) as end:
        predict.main()
    assert end.value.code == 2
    assert capsys.readouterr().err.splitlines()[-1].startswith(said.format(tmp=tmp_path))
    assert not (tmp_path / "out.json").exists()


@pytest.mark.parametrize("script", ["predict", "translate", "score_bytes"])
def test_help_comes_before_torch(script):
    command = [sys.executable, "-X", "importtime", Path(predict.__file__).with_name(f"{script}.py"), "--help"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0
    assert "exit codes: " in done.stdout
    assert not re.search(r"\| +(torch|transformers|datasets)$", done.stderr, re.MULTILINE)
