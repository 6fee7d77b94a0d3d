"""The bits that bytes cost, with a memory and in windows."""

import json
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from transformers import AutoConfig, AutoModelForCausalLM

import score_bytes
from tasks.bytes import byte_tokenizer, stream_bits
from tests.recipes.tiny_configs import TINY_DECODER, transformer_xl


def some_bytes(length):
    return np.random.default_rng(0).integers(256, size=length).astype(np.uint8)


@torch.no_grad()
def whole_bits(model, data):
    """Return the bits of every byte except for the first, read in one pass."""
    ids = torch.from_numpy(data.astype(np.int64))[None]
    logits = model(input_ids=ids[:, :-1]).logits
    return F.cross_entropy(logits[0], ids[0, 1:], reduction="none") / np.log(2)


@torch.no_grad()
@pytest.mark.parametrize("num_processes", [1, 2, 5])
def test_every_byte_is_scored_once_by_whichever_process(num_processes):
    model = transformer_xl()
    data = some_bytes(150)  # 10 segments, the last of 5 bytes, in 4 streams of 3, 3, 2 and 2
    found = {}
    for rank in range(num_processes):
        share = stream_bits(model, data, length=16, num_streams=4, rank=rank, num_processes=num_processes)
        found |= dict(zip(*share, strict=True))
    assert sorted(found) == list(range(10))
    assert [found[segment][1] for segment in range(10)] == [16] * 9 + [5]
    starts, ends = [0, 48, 96, 128], [49, 97, 129, 150]
    expected = [whole_bits(model, data[start:end]).sum().item() for start, end in zip(starts, ends, strict=True)]
    sums = [sum(found[s][0] for s in segments) for segments in ([0, 1, 2], [3, 4, 5], [6, 7], [8, 9])]
    assert sums == pytest.approx(expected, rel=1e-5)


@pytest.fixture
def saved(tmp_path):
    """A decoder of 16 positions that was trained on sequences of 12."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**TINY_DECODER, vocab_size=256)).eval()
    model.save_pretrained(tmp_path / "saved")
    byte_tokenizer(12).save_pretrained(tmp_path / "saved")
    return model, tmp_path / "saved"


def score(folder, data, monkeypatch, *more):
    """Return what the script writes for a file of `data`."""
    file, output = folder / "text", folder / "bits.json"
    file.write_bytes(data.tobytes())
    arguments = ["--model", str(folder), "--data", str(file), "--output", str(output), *more]
    monkeypatch.setattr(sys, "argv", ["score_bytes.py", *arguments])
    score_bytes.main()
    return json.loads(output.read_text())


@pytest.mark.parametrize(("length", "expected"), [(2, [1]), (9, [8]), (13, [12]), (14, [12, 1]), (40, [12] * 3 + [3])])
def test_by_default_windows_are_as_long_as_in_training_and_short_files_one(length, expected, saved, monkeypatch):
    model, folder = saved
    scores = score(folder, some_bytes(length), monkeypatch)
    assert scores["characters"] == expected
    first = whole_bits(model, some_bytes(length)[:13]).sum().item()
    assert scores["bits"][0] == pytest.approx(first, rel=1e-5)


def test_without_an_output_the_score_is_printed(saved, monkeypatch, capsys):
    score(saved[1], some_bytes(14), monkeypatch, "--quiet")
    assert capsys.readouterr().out == ""
    monkeypatch.setattr(sys, "argv", ["score_bytes.py", "--model", str(saved[1]), "--data", str(saved[1] / "text")])
    score_bytes.main()
    (line,) = capsys.readouterr().out.splitlines()
    bits = whole_bits(saved[0], some_bytes(14)[:13]).sum().item()
    assert line.endswith(" bits per character")
    assert float(line.split()[0]) == pytest.approx(bits / 12, rel=0.5)


def test_random_bytes_cost_eight_bits_whatever_the_stride(saved, monkeypatch):
    for stride in ("1", "5", "12"):
        scores = score(saved[1], some_bytes(300), monkeypatch, "--stride", stride)
        assert sum(scores["characters"]) == 299
        assert sum(scores["bits"]) / 299 == pytest.approx(8, abs=0.05)


@pytest.mark.parametrize(
    ("length", "more", "said"),
    [
        (40, ["--stride", "13"], "--stride must be between 1 and --sequence_length 12, got 13"),
        (40, ["--stride", "0"], "argument --stride: invalid positive value: '0'"),
        (40, ["--batch_size", "0"], "argument --batch_size: invalid positive value: '0'"),
        (40, ["--sequence_length", "17"], "--sequence_length 17 is beyond the model's 16 positions"),
        (1, [], "1 bytes; a byte is predicted from those before it"),
        (0, [], "0 bytes; a byte is predicted from those before it"),
    ],
)
def test_what_cannot_be_scored_is_said_in_a_line(length, more, said, saved, monkeypatch, capsys):
    with pytest.raises(SystemExit) as ended:
        score(saved[1], some_bytes(length), monkeypatch, *more)
    assert ended.value.code == 2
    assert said in capsys.readouterr().err
