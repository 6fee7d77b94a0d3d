"""The spec as an object."""

import pytest

from hf_adanorm import AdaNormSpec
from hf_adanorm.spec import NormGroup

GROUP = NormGroup(norm="adanorm", settings={"k": 0.05}, modules=("encoder.layer.*.norm",), normalized_shape=(8,))
SPEC = AdaNormSpec(groups=(GROUP,), biases=("head",), eps={"norm": 1e-3})


def test_it_becomes_json_types_and_back() -> None:
    data = SPEC.to_dict()
    assert data["groups"] == [
        {"norm": "adanorm", "modules": ["encoder.layer.*.norm"], "settings": {"k": 0.05}, "normalized_shape": [8]}
    ]
    assert AdaNormSpec.from_dict(data) == SPEC
    assert SPEC.names() == ["encoder.layer.*.norm", "head", "norm"]


def test_an_unknown_entry_is_refused() -> None:
    with pytest.raises((TypeError, ValueError), match="color"):
        AdaNormSpec.from_dict({**SPEC.to_dict(), "color": 1})
