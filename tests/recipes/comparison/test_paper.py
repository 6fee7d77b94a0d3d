"""The paper's figures."""

from comparison.paper import COLUMNS, ROWS, paper_score


def test_the_papers_figures_have_a_row_for_every_norm():
    assert all(len(values) == len(ROWS) for _, values in COLUMNS.values())
    assert paper_score("En-De", "none") == "diverges"
    assert paper_score("RT", "adanorm") == "77.50"
    assert paper_score("De-En", "adanorm") == "35.6"
