"""The examples in the docstrings of the package run and show what they say."""

from __future__ import annotations

import ast
import doctest
import importlib
import inspect
import pkgutil
import textwrap
import warnings

import pytest

import hf_adanorm

SHOWN = ["patch_model", "inspect_model", "unpatch_model", "AdaNorm", "watch_norms"]
MODULES = sorted(
    info.name
    for info in pkgutil.walk_packages(hf_adanorm.__path__, "hf_adanorm.")
    if not info.name.endswith("__main__")
)


@pytest.mark.parametrize("name", SHOWN)
def test_main_names_have_an_example(name):
    finder = doctest.DocTestFinder(recurse=False)
    assert any(test.examples for test in finder.find(getattr(hf_adanorm, name), name)), f"{name} shows no example"


@pytest.mark.parametrize("name", [name for name in hf_adanorm.__all__ if name != "__version__"])
def test_public_names_and_the_attributes_of_public_classes_have_a_docstring(name):
    found = getattr(hf_adanorm, name)
    assert (found.__doc__ or "").strip()
    if not isinstance(found, type):
        return
    tree = ast.parse(textwrap.dedent(inspect.getsource(found))).body[0]
    after = zip(tree.body, [*tree.body[1:], None], strict=True)
    texts = {node.target.id: getattr(text, "value", None) for node, text in after if isinstance(node, ast.AnnAssign)}
    texts = {key: text for key, text in texts.items() if key[0] != "_"}
    assert [key for key, text in texts.items() if not isinstance(text, ast.Constant)] == []
    # Sphinx would take what is before a colon for the type of the attribute.
    assert [key for key, text in texts.items() if ":" in text.value.partition("\n")[0]] == []


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
