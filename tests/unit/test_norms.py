"""Norms by name, class, partial and text, and their settings."""

from __future__ import annotations

import functools
import math
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor, nn

from hf_adanorm import AdaNorm, patch_model, register_norm, set_norm
from hf_adanorm.norms import norm_names, parse_norm, resolve_norm, settings_of


class Base(nn.Module):
    def __init__(self, normalized_shape: Any, eps: float = 1e-5, *, scale: float = 2.0) -> None:
        super().__init__()
        self.scale = scale

    def forward(self, x: Tensor) -> Tensor:
        return self.scale * x


class Derived(Base):
    def __init__(self, normalized_shape: Any, eps: float = 1e-5, *, shift: float = 0.0, **others: Any) -> None:
        super().__init__(normalized_shape, eps, **others)
        self.shift = shift


FILE = "from .helper import Scale\n\nclass Mine(Scale):\n    pass\n"
HELPER = """
from torch import nn

class Scale(nn.Module):
    def __init__(self, normalized_shape, eps=1e-5, *, alpha=0.5):
        super().__init__()
        self.alpha = alpha

    def forward(self, x):
        return self.alpha * x
"""


class Demanding(nn.Module):
    def __init__(self, normalized_shape: Any, eps: float = 1e-5, *, scale: Any) -> None:
        super().__init__()
        self.scale, self.norm = scale, nn.LayerNorm(normalized_shape)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x)


def test_a_setting_without_default_must_be_given() -> None:
    model = patch_model(nn.Sequential(nn.LayerNorm(4)), Demanding, scale=3)
    assert model[0].settings() == {"scale": 3}
    for norm in (functools.partial(Demanding, scale=3), f"{__name__}:Demanding:scale=3"):
        assert patch_model(nn.Sequential(nn.LayerNorm(4)), norm)[0].settings() == {"scale": 3}
    with pytest.raises(TypeError, match="missing 1 required keyword-only argument: 'scale'"):
        patch_model(nn.Sequential(nn.LayerNorm(4)), Demanding)


@pytest.mark.parametrize(
    ("value", "error"), [("x" * 78, ValueError), (math.nan, ValueError), (-math.inf, ValueError), ([1], TypeError)]
)
def test_a_value_that_a_saved_model_could_not_hold_is_refused(value: Any, error: type[Exception]) -> None:
    model = nn.Sequential(nn.LayerNorm(4))
    with pytest.raises(error, match="scale must be a"):
        patch_model(model, Demanding, scale=value)
    patch_model(model, Demanding, scale="x" * 77)
    with pytest.raises(error, match="scale must be a"):
        set_norm(model, scale=value)


def test_settings_are_the_keyword_only_parameters_inherited_ones_included() -> None:
    assert settings_of(Derived) == {"shift": 0.0, "scale": 2.0}
    assert settings_of(AdaNorm) == {"C": 1.0, "k": 0.1}


@pytest.mark.parametrize(
    ("norm", "expected"),
    [
        ("adanorm", (AdaNorm, {})),
        ("adanorm:k=0.05:C=2", (AdaNorm, {"k": 0.05, "C": 2})),
        (Derived, (Derived, {})),
        (functools.partial(Derived, scale=3.0), (Derived, {"scale": 3.0})),
    ],
)
def test_a_name_a_text_a_class_and_a_partial_resolve(norm: Any, expected: Any) -> None:
    assert resolve_norm(norm) == expected


def test_a_file_is_a_package_of_its_folder(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(FILE)
    (tmp_path / "helper.py").write_text(HELPER)
    cls, settings = resolve_norm(f"{tmp_path / 'mine.py'}:Mine:alpha=0.7")
    assert (cls.__name__, settings, settings_of(cls)) == ("Mine", {"alpha": 0.7}, {"alpha": 0.5})


@pytest.mark.parametrize(
    ("norm", "error", "words"),
    [
        ("adanrom", ValueError, "did you mean 'adanorm'"),
        ("adanorm:kk=1", ValueError, "did you mean 'k'"),
        ("adanorm:k", ValueError, "'k' in 'adanorm:k' is not of the form SETTING=VALUE"),
        ("absent.py:Mine", FileNotFoundError, "absent.py does not exist"),
        ("no.such.module:Mine", ValueError, "no module"),
        ("torch.nn:Linaer", ValueError, "did you mean 'Linear'"),
        (3, TypeError, "a name, a class"),
        ("my_norms.py", ValueError, "write my_norms.py:CLASS"),
        (nn.LayerNorm, TypeError, "norm='layernorm'"),
        (type("Line", (nn.Linear,), {}), TypeError, r"\(normalized_shape, eps, ...\)"),
        (type("adanorm", (Derived,), {}), ValueError, "'adanorm' has the name of a built-in norm"),
        (type("layernorm", (Derived,), {}), ValueError, "the name of a built-in norm"),
        (nn.BatchNorm1d, TypeError, "a class of torch: .* a class of your own"),
        (functools.partial(Derived, 8), TypeError, "keyword arguments only"),
        (functools.partial(Derived, shfit=1), ValueError, "did you mean 'shift'"),
    ],
)
def test_what_is_no_norm_is_refused_with_the_nearest_fix(norm: Any, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        resolve_norm(norm)


@pytest.mark.parametrize(("name", "hint"), [("rmsnorm", None), ("batchnorm", None), ("layernrom", "layernorm")])
def test_only_a_close_spelling_is_suggested(name: str, hint: str | None) -> None:
    with pytest.raises(ValueError, match=f"got '{name}'") as caught:
        resolve_norm(name)
    assert ("did you mean" in str(caught.value)) == (hint is not None)
    assert hint is None or str(caught.value).endswith(f"did you mean {hint!r}?")


def test_a_registered_name_is_known_and_built_in_names_are_not_given_away() -> None:
    register_norm("derived-norm", Derived)
    assert resolve_norm("derived-norm") == (Derived, {})
    assert "derived-norm" in norm_names()
    with pytest.raises(ValueError, match="built-in"):
        register_norm("adanorm", Derived)
    with pytest.raises(ValueError, match="already the name of"):
        register_norm("derived-norm", Base)


@pytest.mark.parametrize(
    ("text", "value"), [("0.5", 0.5), ("3", 3), ("true", True), ("null", None), ("a-b", "a-b"), ("1e-3", 1e-3)]
)
def test_values_of_settings(text: str, value: Any) -> None:
    assert parse_norm(f"adanorm:k={text}") == ("adanorm", {"k": value})
