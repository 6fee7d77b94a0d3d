from pathlib import Path

from tests.recipes.norms.norm_checks import check_formula, check_round_trip


def test_it_is_its_formula() -> None:
    check_formula("plain_rms.py:PlainRMS", lambda x: x / (x.pow(2).sum(-1, keepdim=True) / 16 + 1e-12).sqrt())


def test_it_survives_a_round_trip_without_parameters(tmp_path: Path) -> None:
    again = check_round_trip("plain_rms.py:PlainRMS", tmp_path)
    assert not [name for name, _ in again.named_parameters() if "LayerNorm" in name]
