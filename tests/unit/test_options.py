"""The options of a patch are the same wherever they are given."""

from __future__ import annotations

import inspect

from hf_adanorm import patch_model
from hf_adanorm.cli import patch
from hf_adanorm.modeling_adanorm import NORM_CLASSES
from hf_adanorm.options import norms, patch_options
from hf_adanorm.swapping import Options

PATCH_OPTIONS = patch_options()


def defaults(function: object) -> dict[str, object]:
    parameters = inspect.signature(function).parameters  # type: ignore[arg-type]
    return {name: found.default for name, found in parameters.items() if name in PATCH_OPTIONS}


def test_what_is_read_off_the_source_is_what_the_classes_say() -> None:
    assert norms().keys() == NORM_CLASSES.keys()
    for norm, found in norms().items():
        kind = NORM_CLASSES[norm]
        settings = {name: (setting.default, setting.help) for name, setting in kind.SETTINGS.items()}
        assert (found.title, found.color, found.settings) == (kind.title, kind.color, settings)


def test_signature_command_line_and_plan_have_the_stated_defaults() -> None:
    stated = {name: option.default for name, option in PATCH_OPTIONS.items()}
    assert defaults(patch_model) == stated
    for function in (patch, Options):
        found = defaults(function)
        assert found == {name: stated[name] for name in found}
        assert len(found) >= 11


def test_the_constructors_have_the_stated_defaults() -> None:
    for kind in NORM_CLASSES.values():
        parameters = inspect.signature(kind).parameters
        assert {name: parameters[name].default for name in kind.SETTINGS} == {
            name: setting.default for name, setting in kind.SETTINGS.items()
        }
