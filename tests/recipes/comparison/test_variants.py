"""Norms named with their settings."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from common.options import NORMS, OptionError
from comparison.variants import TITLES, in_order, norm_name, parse_norm, title_of


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("adanrom", "expected none, layernorm, .* did you mean 'adanorm'"),
        ("adanorm:", "adanorm has the settings C, k, not ''"),
        ("adanorm:c=2", "has the settings C, k, not 'c'"),
        ("detachnorm:detach_varience=false", "did you mean 'detach_variance'"),
        ("layernorm:C=2", "layernorm has no settings, not 'C'"),
        ("adanorm:C=1,C=2", "C stands there twice"),
        ("adanorm:C", "expected C=a number, got 'C'"),
        ("adanorm:C=two", "expected C=a number, got 'C=two'"),
        ("detachnorm:detach_mean=0", "expected detach_mean=true or false, got 'detach_mean=0'"),
    ],
)
def test_what_names_no_norm_is_refused(text, said):
    with pytest.raises(OptionError, match=said):
        parse_norm(text)


@given(st.sampled_from(sorted(NORMS)), st.data())
def test_a_name_is_read_as_what_it_was_made_of(norm, data):
    settings = {
        name: data.draw(st.booleans() if isinstance(default, bool) else st.floats(0, 1e6))
        for name, (default, _) in NORMS[norm].settings.items()
        if data.draw(st.booleans())
    }
    assert parse_norm(norm_name(norm, settings)) == (norm, settings)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("layernorm", "LayerNorm"),
        ("adanorm:C=2,k=0.05", "AdaNorm (C = 2, k = 0.05)"),
        ("detachnorm:detach_variance=false", "DetachNorm (mean only)"),
        ("detachnorm:detach_mean=false", "DetachNorm (variance only)"),
    ],
)
def test_contestants_have_readable_titles(name, expected):
    assert title_of(name) == expected


def test_contestants_of_one_norm_stand_together():
    names = ["adanorm:C=2", "layernorm", "adanorm", "layernorm", "none"]
    assert in_order(names) == ["none", "layernorm", "adanorm:C=2", "adanorm"]
    assert in_order(TITLES) == list(TITLES)
