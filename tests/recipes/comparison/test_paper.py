"""The paper's figures."""

from pathlib import Path

import compare
from comparison.paper import COLUMNS, CONFIGS, ROWS, paper_score, row_name

RECIPES = Path(compare.__file__).parent


def test_the_papers_figures_have_a_row_for_every_norm():
    assert all(len(values) == len(ROWS) for _, values in COLUMNS.values())
    assert paper_score("En-De", "none") == "diverges"
    assert paper_score("RT", "adanorm") == "77.50"
    assert paper_score("De-En", "adanorm") == "35.6"
    assert paper_score("RT", "my_norms.py:Derf") == "-"


def test_every_config_of_a_row_exists_and_every_row_has_one():
    assert all((RECIPES / "configs" / f"{config}.yaml").is_file() for config in CONFIGS)
    assert {column for column, data in CONFIGS.values() if not data} == set(COLUMNS)
    assert (row_name("rt"), row_name("ud_ewt")) == ("RT", "PTB (UD English-EWT)")
