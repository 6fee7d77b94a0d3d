"""The examples in the docstrings of the package run and show what they say."""

from __future__ import annotations

import doctest
import importlib
import pkgutil
import warnings

import pytest

import hf_adanorm

SHOWN = ["patch_model", "inspect_model", "unpatch_model", "AdaNorm", "watch_norms", "compare_outputs"]
MODULES = sorted(
    info.name
    for info in pkgutil.walk_packages(hf_adanorm.__path__, "hf_adanorm.")
    if not info.name.endswith("__main__")
)


@pytest.mark.parametrize("name", SHOWN)
def test_main_names_have_an_example(name):
    finder = doctest.DocTestFinder(recurse=False)
    assert any(test.examples for test in finder.find(getattr(hf_adanorm, name), name)), f"{name} shows no example"


@pytest.mark.parametrize("name", hf_adanorm.__all__)
def test_public_names_have_a_docstring(name):
    if not name.startswith("__"):
        assert (getattr(hf_adanorm, name).__doc__ or "").strip()


@pytest.mark.parametrize("name", MODULES)
def test_examples_run(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    try:
        module = importlib.import_module(name)
    except ImportError as error:
        pytest.skip(f"{name} needs an extra: {error}")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        result = doctest.testmod(module, verbose=False, optionflags=doctest.NORMALIZE_WHITESPACE)
    assert result.failed == 0
