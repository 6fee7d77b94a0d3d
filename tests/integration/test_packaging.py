"""sdist and wheel build, install into a fresh environment, and work there."""

from __future__ import annotations

import ast
import os
import re
import shutil
import subprocess
import sys
import tarfile
import venv
import zipfile
from email.parser import Parser
from pathlib import Path

import pytest
from packaging.version import Version

import hf_adanorm

ROOT = Path(__file__).parents[2]
pytest.importorskip("setuptools", minversion="77", reason="building needs setuptools 77 or newer")


def run(*command, **options):
    done = subprocess.run([str(word) for word in command], capture_output=True, text=True, **options)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return done.stdout


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """The sdist, made from a copy of the project, and the wheel, made from the unpacked sdist."""
    work = tmp_path_factory.mktemp("build")
    source = work / "source"
    source.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE", "CHANGELOG.md", "CITATION.cff"):
        if (ROOT / name).exists():
            shutil.copy(ROOT / name, source)
    shutil.copytree(ROOT / "hf_adanorm", source / "hf_adanorm", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copytree(ROOT / "tests", source / "tests", ignore=shutil.ignore_patterns("__pycache__"))
    build = "import sys, setuptools.build_meta as b; print(getattr(b, 'build_' + sys.argv[1])(sys.argv[2]))"
    sdist = work / run(sys.executable, "-c", build, "sdist", work, cwd=source).split()[-1]
    with tarfile.open(sdist) as archive:
        archive.extractall(work / "unpacked", filter="data")
    (unpacked,) = (work / "unpacked").iterdir()
    wheel = work / run(sys.executable, "-c", build, "wheel", work, cwd=unpacked).split()[-1]
    return sdist, wheel


@pytest.fixture(scope="module")
def metadata(built):
    with zipfile.ZipFile(built[1]) as archive:
        (name,) = (n for n in archive.namelist() if n.endswith(".dist-info/METADATA"))
        return Parser().parsestr(archive.read(name).decode())


def test_the_wheel_holds_the_package_and_nothing_else(built):
    with zipfile.ZipFile(built[1]) as archive:
        names = set(archive.namelist())
    assert {name.split("/")[0] for name in names} == {"hf_adanorm", f"hf_adanorm-{hf_adanorm.__version__}.dist-info"}
    for path in (ROOT / "hf_adanorm").rglob("*"):
        if path.is_file() and "__pycache__" not in path.parts:
            assert path.relative_to(ROOT).as_posix() in names
    assert any(name.endswith("licenses/LICENSE") for name in names)


def test_the_sdist_holds_what_the_build_needs(built):
    with tarfile.open(built[0]) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert {"pyproject.toml", "README.md", "LICENSE", "hf_adanorm/__init__.py", "hf_adanorm/py.typed"} <= names


def test_metadata_is_complete(metadata):
    assert metadata["Name"] == "hf-adanorm"
    assert metadata["Version"] == hf_adanorm.__version__
    assert metadata["Summary"]
    assert metadata["License-Expression"] == "Apache-2.0"
    assert metadata["Requires-Python"]
    assert metadata["Keywords"]
    assert not metadata.get_all("Project-URL")  # none exists yet
    assert metadata.get_all("Classifier")
    assert metadata["Description-Content-Type"] == "text/markdown"
    assert metadata.get_payload().startswith("# hf_adanorm")


def test_the_core_needs_torch_and_transformers_only(metadata):
    core = [need for need in metadata.get_all("Requires-Dist") if "extra ==" not in need]
    assert sorted(re.match(r"[\w-]+", need)[0] for need in core) == ["torch", "transformers"]
    assert {"demo", "plots", "recipes", "test", "all"} <= set(metadata.get_all("Provides-Extra"))


def test_versions_agree():
    changelog = (ROOT / "CHANGELOG.md").read_text()
    assert hf_adanorm.__version__ in changelog
    citation = (ROOT / "CITATION.cff").read_text()
    assert re.search(r"^version: (.+)$", citation, re.MULTILINE)[1].strip("\"'") == hf_adanorm.__version__


def test_the_versions_that_are_said_to_work_are_those_of_the_matrix(metadata):
    matrix = ast.parse((ROOT / "noxfile.py").read_text())
    listed = {
        name: ast.literal_eval(node.value)
        for node in matrix.body
        if isinstance(node, ast.Assign)
        and (name := ast.unparse(node.targets[0])) in ("PYTHON", "TRANSFORMERS", "TORCH")
    }
    bounds = dict(re.match(r"([\w-]+)>=([\d.]+)$", need).groups() for need in metadata.get_all("Requires-Dist")[:2])
    assert {name: Version(bound) for name, bound in bounds.items()} == {
        "torch": Version(listed["TORCH"][0]),
        "transformers": Version(listed["TRANSFORMERS"][0]),
    }
    assert metadata["Requires-Python"] == f">={listed['PYTHON'][0]}"


def test_installs_into_an_empty_environment_and_runs_the_cell_of_the_readme(built, tmp_path):
    folder = tmp_path / "fresh"
    venv.create(folder, with_pip=False)
    python = folder / ("Scripts" if os.name == "nt" else "bin") / "python"
    run(sys.executable, "-m", "pip", "--python", python, "install", "--no-deps", "--no-index", "--quiet", built[1])
    # torch and transformers come from the environment of the tests, after the fresh one's own packages.
    purelib = Path(run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))").strip())
    # The parent process may itself have them from folders on its path.
    folders = [path for path in sys.path if path.endswith("site-packages")]
    (purelib / "tests_environment.pth").write_text("\n".join(folders) + "\n")
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"} | {"HF_HUB_OFFLINE": "1"}
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    cell = re.findall(r"```python\n(.*?)```", readme, re.DOTALL)[0]
    shown = run(python, "-c", f"{cell}\nprint(hf_adanorm.__file__)", cwd=tmp_path, env=environment)
    assert Path(shown.splitlines()[-1]).is_relative_to(folder)
    assert (tmp_path / "out" / "modeling_adanorm.py").is_file()
    assert "inspect" in run(python.parent / "hf-adanorm", "--help", cwd=tmp_path, env=environment)
