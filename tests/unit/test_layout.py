"""Tests are where one looks for them: each module has a test file of its name, in the same place."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def test_the_matrix_of_versions_runs_tests_that_exist():
    for file in ("noxfile.py", "Makefile"):
        text = (ROOT / file).read_text(encoding="utf-8")
        named = re.findall(r"(?:unit|integration|recipes|campaigns)/[a-z_/]*test_[a-z_]+\.py", text)
        assert [name for name in named if not (ROOT / "tests" / name).is_file()] == []


@pytest.mark.parametrize(("code", "tests"), [("hf_adanorm", "unit"), ("recipes", "recipes")])
def test_every_module_has_a_test_file_of_its_name(code, tests):
    modules = [path.relative_to(ROOT / code) for path in (ROOT / code).rglob("*.py") if path.name != "__init__.py"]
    named = {path: path.with_name(f"test_{path.name.removeprefix('_')}") for path in modules}
    assert named
    assert [str(path) for path, test in named.items() if not (ROOT / "tests" / tests / test).is_file()] == []
