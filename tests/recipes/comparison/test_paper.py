"""The paper's figures."""

from comparison.paper import COLUMNS, CONFIGS, ROWS, margin, paper_score
from tests.recipes.comparison.comparison_runs import RECIPES


def test_the_papers_figures_have_a_row_for_every_norm():
    assert all(len(column["scores"]) == len(ROWS) for column in COLUMNS.values())
    assert paper_score("En-De", "none") == "diverges"
    assert paper_score("RT", "adanorm") == "77.50"
    assert paper_score("De-En", "adanorm") == "35.6"
    assert paper_score("RT", "my_norms.py:Derf") == "-"


def test_every_config_of_a_row_exists_and_every_row_has_one():
    assert all((RECIPES / "configs" / f"{config}.yaml").is_file() for config in CONFIGS)
    assert {column for column, data in CONFIGS.values() if not data} == set(COLUMNS)


def test_the_margin_is_that_of_the_metric_and_of_mnist():
    assert (margin("accuracy", "RT"), margin("accuracy", "MNIST"), margin("accuracy", None)) == (0.5, 0.1, 0.5)
    assert margin("bits_per_character", "Enwiki8") == 0.02
