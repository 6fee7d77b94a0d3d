"""The study of a language model moved to norms without parameters, at toy size: it runs, resumes and reports."""

from __future__ import annotations

import gzip
import json
import math
import sys
from pathlib import Path

import pytest

from studies import language_model as study
from tests.zoo.fold_models import tied_llama
from tests.zoo.tiny_text import TEXTS, make_tokenizer


@pytest.fixture
def arguments(tmp_path: Path) -> list[str]:
    """The command line with a small model and two texts."""
    folder, wiki, other = tmp_path / "model", tmp_path / "wiki.xml.gz", tmp_path / "news.txt"
    tied_llama().save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    words = " ".join(TEXTS[i * i % 11 % len(TEXTS)] for i in range(200))
    pages = f"<page><text>#REDIRECT [[there]]</text></page><page><text>{words}</text></page>"
    wiki.write_bytes(gzip.compress(f"<mediawiki>{pages}</mediawiki>".encode()))
    other.write_text(words[:1000])
    sizes = [
        "--length",
        "16",
        "--segments",
        "3",
        "--steps",
        "3",
        "--batch_size",
        "2",
        "--learning_rates",
        "1e-3",
        "1e-2",
    ]
    names = ["--model", folder, "--text", wiki, "--other_text", other, "--output_dir", tmp_path / "out"]
    return ["language_model.py", *map(str, names), *sizes, "--train", "source", "adanorm-k-ramp"]


def test_a_language_model_is_moved_and_trained(
    tmp_path: Path, arguments: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", arguments)
    monkeypatch.setattr(study, "AT_ONCE", ("source", "simple-drop", "simple-untie", "adanorm-k-calibrate"))
    out = tmp_path / "out"
    study.main()
    starts = {path.stem: json.loads(path.read_text())["tests"]["text"] for path in (out / "start").iterdir()}
    assert set(starts) == set(study.AT_ONCE)
    assert starts["simple-untie"] == pytest.approx(starts["source"], rel=1e-6)
    assert starts["simple-drop"] != pytest.approx(starts["source"], rel=1e-4)
    assert len(list((out / "runs").iterdir())) == 2 * (2 + 1)  # two rates on seed 0, the better one on seed 1
    capsys.readouterr()
    times = {path: path.stat().st_mtime_ns for path in out.glob("*/*.json")}
    study.main()  # everything is there: only the tables are made
    assert {path: path.stat().st_mtime_ns for path in out.glob("*/*.json")} == times
    tables = capsys.readouterr().out
    assert tables.count("| source |") == 2
    assert "| simple-untie |" in tables
    assert (out / "norms.png").stat().st_size > 10_000


def test_perplexity_against_a_baseline_is_paired_by_segment() -> None:
    base = [{"tests": {"text": [1.0, 3.0, 2.0, 5.0]}}]
    twice = [{"tests": {"text": [loss + math.log(2) for loss in base[0]["tests"]["text"]]}}]
    assert study.perplexity(twice, "text", base) == "+100.00 % (+100.00 to +100.00)"
    assert study.perplexity(base, "text").startswith(f"{math.exp(11 / 4):.4g} (")


def test_a_run_is_held_against_that_of_the_same_seed() -> None:
    base = [{"seed": seed, "tests": {"text": [seed + 1.0, seed + 2.0]}} for seed in (0, 1)]
    twice = [
        {"seed": seed, "tests": {"text": [seed + 1.0 + math.log(2), seed + 2.0 + math.log(2)]}} for seed in (2, 1)
    ]
    assert study.against(twice, "text", base) == "+100.00 % (+100.00 to +100.00)"


def test_a_text_too_short_for_its_segments_is_refused(
    tmp_path: Path, arguments: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", [*arguments, "--segments", "1000"])
    with pytest.raises(ValueError, match="less than 1000 segments of 16"):
        study.main()


def test_markup_is_taken_off_an_article() -> None:
    article = (
        "{{Infobox|a={{b}}}}\n== History ==\n'''Aa''' is [[city|a city]] in [[Bb]].&lt;ref name=x&gt;No&lt;/ref&gt;\n"
        "{| class=c\n|-\n| 1\n|}\n[[File:a.png|thumb|of [[Aa]]]]See [http://a.b the site]."
    )
    assert study.without_markup(article) == "History\nAa is a city in Bb.\n\nSee the site."
