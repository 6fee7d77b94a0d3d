"""The options that the command line and `patch_model` share."""

import inspect

import pytest

from hf_adanorm import Fold, patch_model
from hf_adanorm.options import CHOICES, HELP
from tests.zoo.round_trip import build


def test_each_is_an_argument() -> None:
    known = {*inspect.signature(patch_model).parameters, *inspect.signature(Fold).parameters}
    assert CHOICES.keys() | HELP.keys() <= known


@pytest.mark.parametrize("option", ["targets", "affine"])
def test_another_choice_is_refused_and_the_choices_are_listed(option: str) -> None:
    with pytest.raises(ValueError, match=option) as error:
        patch_model(build("bert"), **{option: "nothing"})
    assert all(f"'{choice}'" in str(error.value) or f'"{choice}"' in str(error.value) for choice in CHOICES[option])
