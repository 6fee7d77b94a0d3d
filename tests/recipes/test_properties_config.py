"""Recipe options from the command line and from YAML: what is right is taken over, what is wrong is named."""

from __future__ import annotations

import dataclasses
import functools
import typing
from collections import Counter
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, Union

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import classification
import language_modeling
import parsing
import translation
from common.options import OptionError, check_ranges, parse_options, read_config

OPTIONS: dict[str, Any] = {
    "classification": classification.ClassificationOptions,
    "translation": translation.TranslationOptions,
    "language_modeling": language_modeling.LanguageModelingOptions,
    "parsing": parsing.ParsingOptions,
}
outcomes: Counter[str] = Counter()
same_fixture = settings(max_examples=40, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])


def values(hint: Any) -> st.SearchStrategy[Any]:
    """Values of an option's type, as YAML has them."""
    origin = typing.get_origin(hint)
    if origin is Literal:
        return st.sampled_from(typing.get_args(hint))
    if origin in (Union, UnionType):
        return st.one_of(*(values(part) for part in typing.get_args(hint)))
    if origin is list:
        return st.lists(values(typing.get_args(hint)[0]), max_size=2)
    if hint is dict or origin is dict:
        return st.dictionaries(
            st.sampled_from(["hidden_size", "model_type"]), st.sampled_from([4, "bert"]), max_size=2
        )
    simple: dict[Any, st.SearchStrategy[Any]] = {
        NoneType: st.none(),
        bool: st.booleans(),
        int: st.integers(1, 1000),
        float: st.floats(0.001, 0.9),
        str: st.sampled_from(["outputs/a", "name", "löschen", "x.jsonl", "a b", "👍", "عربى"]),
    }
    return simple[hint]


def fits(recipe: str, name: str, value: Any) -> bool:
    """Return whether a value is within the range of its option."""
    try:
        check_ranges(OPTIONS[recipe](**{name: value}))
    except OptionError:
        return False
    return True


def wrong(hint: Any) -> Any:
    """A value of another type."""
    parts = typing.get_args(hint) if typing.get_origin(hint) in (Union, UnionType) else [hint]
    takes_dict = any(part is dict or typing.get_origin(part) is dict for part in parts)
    return [[["deep"]]] if takes_dict else {"a": {"b": [1]}}


def as_flag(value: Any) -> str:
    """A value as one types it."""
    return value if isinstance(value, str) else yaml.safe_dump(value).removesuffix("...\n").strip()


@st.composite
def configs(draw: st.DrawFn) -> tuple[str, dict[str, Any], str | None]:
    """(recipe, YAML mapping, the key that was spoilt)."""
    recipe = draw(st.sampled_from(sorted(OPTIONS)))
    hints = typing.get_type_hints(OPTIONS[recipe])
    hints = {item.name: hints[item.name] for item in dataclasses.fields(OPTIONS[recipe])}
    keys = draw(
        st.lists(
            st.sampled_from(sorted(hints.keys() - {"norm", "norm_settings"})), min_size=1, max_size=25, unique=True
        )
    )
    config = {key: draw(values(hints[key]).filter(functools.partial(fits, recipe, key))) for key in keys}
    how = draw(st.sampled_from([None, None, "typo", "type"]))
    if how is None:
        return recipe, config, None
    spoilt = keys[0]
    if how == "type":
        config[spoilt] = wrong(hints[spoilt])
        return recipe, config, spoilt
    at = draw(st.integers(1, len(spoilt) - 1)) if len(spoilt) > 1 else 0
    typo = spoilt[:at] + "_q" + spoilt[at:]
    config[typo] = config.pop(spoilt)
    return recipe, config, typo


@same_fixture
@given(configs())
def test_a_config_file_is_taken_over_or_its_error_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], case: tuple[str, dict[str, Any], str | None]
) -> None:
    recipe, config, spoilt = case
    file = tmp_path / "config.yaml"
    file.write_text(yaml.safe_dump(config, allow_unicode=True), encoding="utf-8")
    capsys.readouterr()
    if spoilt:
        with pytest.raises(SystemExit) as ended:
            parse_options(OPTIONS[recipe], ["--config", str(file)])
        assert ended.value.code == 2
        said = capsys.readouterr().err
        assert spoilt in said
        assert "Traceback" not in said
        if "_q" in spoilt and len(spoilt) > 5:
            assert "did you mean" in said
        outcomes["refused"] += 1
        return
    options = parse_options(OPTIONS[recipe], ["--config", str(file)])
    for key, value in config.items():
        if key.endswith("_file") and value is not None:
            value = str((tmp_path / value).resolve())
        assert getattr(options, key) == value, key
    outcomes["read"] += 1


@same_fixture
@given(configs())
def test_a_command_line_is_taken_over_or_its_error_named(
    capsys: pytest.CaptureFixture[str], case: tuple[str, dict[str, Any], str | None]
) -> None:
    recipe, config, spoilt = case
    argv = [text for key, value in config.items() for text in (f"--{key}", as_flag(value))]
    capsys.readouterr()
    if spoilt and "_q" in spoilt:
        with pytest.raises(SystemExit) as ended:
            parse_options(OPTIONS[recipe], argv)
        assert ended.value.code == 2
        assert spoilt in capsys.readouterr().err
        outcomes["refused"] += 1
        return
    if spoilt:  # on a command line everything is a text at first: wrong is only what nothing can be made of
        return
    options = parse_options(OPTIONS[recipe], argv)
    assert {item.name for item in dataclasses.fields(options)} >= set(config)
    for key, value in config.items():
        if isinstance(value, (bool, int, float)):
            assert getattr(options, key) == value, key
    outcomes["read"] += 1


@settings(max_examples=150, derandomize=True)
@given(
    st.sampled_from(["learning_rate", "num_epochs", "max_steps", "weight_decay", "warmup_ratio", "adam_beta1"]),
    st.floats(-5, 5).filter(bool),
)
def test_numbers_outside_their_range_are_named(name: str, value: float) -> None:
    options = classification.ClassificationOptions(**{name: value})
    allowed = value > 0 if name not in {"warmup_ratio", "adam_beta1"} else 0 <= value < 1
    if name == "warmup_ratio" and value == 1:
        allowed = True
    if allowed:
        check_ranges(options)
        outcomes["read"] += 1
    else:
        with pytest.raises(OptionError, match=f"--{name} "):
            check_ranges(options)
        outcomes["refused"] += 1


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("seed: 1\nseed: 2\n", "the key 'seed' is repeated"),
        ("seed: [1\n", "not a YAML file"),
        ("\tseed: 1\n", "not a YAML file"),
        ("- seed\n", "expected a mapping"),
    ],
)
def test_a_config_that_is_none_is_refused_in_one_line(tmp_path: Path, text: str, said: str) -> None:
    (tmp_path / "config.yaml").write_text(text)
    with pytest.raises(OptionError) as raised:
        read_config(tmp_path / "config.yaml", {"seed"})
    assert said in str(raised.value)
    assert "\n" not in str(raised.value)


def test_an_unquoted_no_is_a_precision(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("mixed_precision: no\n")
    options = parse_options(classification.ClassificationOptions, ["--config", str(tmp_path / "config.yaml")])
    assert options.mixed_precision == "no"


def test_enough_of_the_cases_were_valid() -> None:
    print(f"\nconfigs: {dict(outcomes)}")
    assert sum(outcomes.values()) >= 200
    assert outcomes["read"] >= 0.3 * sum(outcomes.values())
