"""The study of ways from a pretrained model to AdaNorm, at toy size: it runs, resumes and reports."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from transformers import BertConfig, BertModel, BertTokenizerFast

from common.options import OptionError
from studies import pretrained

WORDS = ["good", "bad", "film", "plot", "a", "the", "very", "not"]


def run(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> None:
    monkeypatch.setattr(sys, "argv", ["pretrained.py", *map(str, arguments)])
    pretrained.main()


@pytest.fixture
def encoder(tmp_path: Path) -> Path:
    folder = tmp_path / "encoder"
    folder.mkdir()
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]
    (folder / "vocab.txt").write_text("\n".join(vocabulary))
    BertTokenizerFast(vocab_file=str(folder / "vocab.txt")).save_pretrained(folder)
    torch.manual_seed(0)
    model = BertModel(
        BertConfig(
            vocab_size=len(vocabulary),
            hidden_size=16,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=32,
            max_position_embeddings=32,
        ),
        add_pooling_layer=False,
    )
    for module in model.modules():
        if isinstance(module, torch.nn.LayerNorm):
            torch.nn.init.uniform_(module.weight, 0.5, 1.0)
            torch.nn.init.uniform_(module.bias, -0.2, 0.2)
    model.save_pretrained(folder)
    return folder


@pytest.fixture
def sentences(tmp_path: Path) -> Path:
    folder = tmp_path / "data"
    folder.mkdir()
    for split, count in (("train", 48), ("validation", 8), ("test", 8)):
        rows = [
            {"text": " ".join(WORDS[(i + j) % len(WORDS)] for j in range(3 + i % 4)), "label": i % 2}
            for i in range(count)
        ]
        (folder / f"{split}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folder


def test_every_way_from_a_pretrained_model_runs_and_resumes(
    tmp_path: Path, encoder: Path, sentences: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    arguments = ["--model", encoder, "--data", sentences, "--output_dir", out, "--steps", 3, "--seeds", 1]
    arguments += ["--learning_rates", 1e-3, 1e-4]
    run(monkeypatch, *arguments)
    runs = {path.name: json.loads(path.read_text()) for path in (out / "runs").glob("*.json")}
    assert len(runs) == 2 * len(pretrained.WAYS)
    starts = {result["way"]: result["start"]["cosine"] for result in runs.values()}
    assert starts["layernorm"] == pytest.approx(1.0)
    assert starts["simple-calibrated"] > starts["simple-drop"]
    assert starts["adanorm-fade"] == pytest.approx(1.0, abs=1e-5)
    times = {path.name: path.stat().st_mtime_ns for path in (out / "runs").iterdir()}
    capsys.readouterr()
    run(monkeypatch, *arguments)  # everything is there: only the table is made
    assert {path.name: path.stat().st_mtime_ns for path in (out / "runs").iterdir()} == times
    table = capsys.readouterr().out
    assert all(f"| {way} |" in table for way in pretrained.WAYS)
    assert (out / "loss.png").stat().st_size > 10_000
    spoilt = json.loads(next(iter((out / "runs").glob("simple-drop-*"))).read_text())
    spoilt["losses"][-1] = None  # a loss that was not finite
    next(iter((out / "runs").glob("simple-drop-*"))).write_text(json.dumps(spoilt))
    run(monkeypatch, *arguments, "--summary_only")
    assert "| simple-drop |" in capsys.readouterr().out
    with pytest.raises(OptionError, match=r"--margin 0\.25 then, 0\.5 now"):
        run(monkeypatch, *arguments, "--margin", 0.5)


def test_a_missing_split_is_named(
    tmp_path: Path, encoder: Path, sentences: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (sentences / "test.jsonl").unlink()
    with pytest.raises(FileNotFoundError, match=r"test\.jsonl is missing"):
        run(
            monkeypatch,
            *("--model", encoder, "--data", sentences, "--output_dir", tmp_path / "out"),
        )
