"""Tables as text and as HTML."""

from __future__ import annotations

import pytest

from hf_adanorm._tables import html_table, text_table

WIDE = [(f"layer.{i}", *(f"{i}.{j}" * 3 for j in range(12))) for i in range(3)]
HEADER = ("name", *(f"statistic_{j}" for j in range(12)))


@pytest.mark.parametrize("width", [60, 80, 120])
def test_a_wide_table_fits_the_terminal_and_repeats_its_first_column(monkeypatch, width):
    monkeypatch.setenv("COLUMNS", str(width))
    lines = text_table(HEADER, WIDE).splitlines()
    assert max(map(len, lines)) <= width
    assert sum(line.startswith("layer.2") for line in lines) > 1
    assert {word for line in lines for word in line.split()} >= {*HEADER, *(cell for row in WIDE for cell in row)}


def test_sentences_are_wrapped_and_names_are_not():
    name, why = "encoder.layer.0.attention.output.LayerNorm", "it is added to the residual stream, and nothing folds"
    text = text_table(("norm", "why"), [(name, why)], width=72)
    assert max(map(len, text.splitlines())) <= 72
    assert name in text
    assert " ".join(text.split()).endswith("nothing folds")


def test_html_escapes_and_takes_the_colors_of_the_page():
    page = html_table(("<a>",), [("<b>",)], "x < y & z")
    for raw in ("<a>", "<b>", "x < y", "y & z"):
        assert raw not in page
    assert "color:inherit" in page
    assert "#fff" not in page
