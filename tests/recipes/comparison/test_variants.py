"""Norms named with their settings."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common.options import OptionError
from comparison.variants import canonical, folder_name, in_order, join, known_settings, public_name, split, title_of


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("adanrom", "expected none, layernorm, .* did you mean 'adanorm'"),
        ("adanorm:", "expected adanorm:SETTING=VALUE, got '' after adanorm"),
        ("adanorm:C", "expected adanorm:SETTING=VALUE, got 'C' after adanorm"),
        ("adanorm:C=1:C=2", "a setting is given twice"),
        ("adanorm:c=2", "'c'.*did you mean 'C'"),
        ("detachnorm:detach_varience=false", "did you mean 'detach_variance'"),
        ("layernorm:C=2", "layernorm has no settings"),
        ("absent.py:Derf", "absent.py does not exist"),
    ],
)
def test_what_names_no_norm_is_refused(text, said):
    with pytest.raises(OptionError, match=said):
        known_settings(text)


_VALUES = st.one_of(st.none(), st.booleans(), st.integers(), st.floats(allow_nan=False, allow_infinity=False))


@settings(max_examples=50)
@given(
    st.sampled_from(["adanorm", "layernorm", "my_norms.py:Derf", "pkg.mod:Derf"]),
    st.dictionaries(st.sampled_from(["alpha", "C", "k"]), _VALUES),
)
def test_a_name_is_read_as_what_it_was_made_of(norm, values):
    assert split(join(norm, values)) == (norm, values)


def test_settings_that_change_nothing_are_dropped_and_the_others_ordered():
    usual = known_settings("adanorm")
    assert list(usual.items()) == [("C", 1.0), ("k", 0.1)]
    assert canonical("adanorm:k=0.2,C=2.0", usual) == "adanorm:C=2:k=0.2"
    assert canonical("adanorm:C=1,k=0.10", usual) == "adanorm"
    assert canonical("adanorm:C=1", usual, ["C"]) == "adanorm:C=1"  # the grid would vary it
    assert canonical("adanorm:C=1", {**usual, "C": 2}) == "adanorm:C=1"


@pytest.mark.parametrize(
    ("name", "title", "folder"),
    [
        ("layernorm", "LayerNorm", "layernorm"),
        ("adanorm:C=2:k=0.05", "AdaNorm (C = 2, k = 0.05)", "adanorm,C=2,k=0.05"),
        ("detachnorm:detach_variance=false", "DetachNorm (mean only)", "detachnorm,detach_variance=false"),
        ("detachnorm:detach_mean=false", "DetachNorm (variance only)", "detachnorm,detach_mean=false"),
        ("/home/me/my_norms.py:Derf:alpha=0.7", "Derf (alpha = 0.7)", "my_norms.Derf,alpha=0.7"),
        ("pkg.mod:Derf:shift=-1", "Derf (shift = -1)", "pkg.mod,Derf,shift=-1"),
    ],
)
def test_variants_have_readable_titles_and_folders_that_any_system_takes(name, title, folder):
    assert (title_of(name), folder_name(name)) == (title, folder)
    assert public_name(name) == name.removeprefix("/home/me/")


def test_variants_of_one_norm_stand_together_and_own_norms_last():
    names = ["a.py:Derf", "adanorm:C=2", "layernorm", "adanorm", "layernorm", "none"]
    assert in_order(names) == ["none", "layernorm", "adanorm:C=2", "adanorm", "a.py:Derf"]
