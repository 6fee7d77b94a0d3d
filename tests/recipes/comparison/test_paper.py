"""The paper's figures."""

from pathlib import Path

import compare
from comparison.paper import COLUMNS, CONFIGS, NEEDS, ROWS, SUBSTITUTES, paper_score

RECIPES = Path(compare.__file__).parent


def test_the_papers_figures_have_a_row_for_every_norm():
    assert all(len(values) == len(ROWS) for _, values in COLUMNS.values())
    assert paper_score("En-De", "none") == "diverges"
    assert paper_score("RT", "adanorm") == "77.50"
    assert paper_score("De-En", "adanorm") == "35.6"


def test_every_row_says_what_it_needs_by_a_config():
    assert list(NEEDS) == list(COLUMNS)
    for column, need in NEEDS.items():
        assert CONFIGS[need.config] == column
        assert (RECIPES / "configs" / f"{need.config}.yaml").is_file()
    assert {name for name, _ in SUBSTITUTES.values()} <= set(COLUMNS)
