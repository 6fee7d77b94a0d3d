"""What the recipes do around an evaluation."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from common.evaluation import accuracy, is_better, run_fresh_process

SCRIPT = """
import os, sys
from pathlib import Path
import beside
Path(sys.argv[1]).write_text(f"{beside.WHERE}\\n{os.getcwd()}\\n{os.environ['PYTHONPATH']}")
"""


def test_a_fresh_process_starts_in_a_folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Import nothing from the shared temporary folder, and resolve relative paths against the current one."""
    shared, here = tmp_path / "shared", tmp_path / "here"
    for folder in (shared, here):
        folder.mkdir()
        (folder / "beside.py").write_text(f"WHERE = {folder.name!r}")
    (tmp_path / "script").mkdir()
    (tmp_path / "script" / "script.py").write_text(SCRIPT)
    monkeypatch.setattr("tempfile.tempdir", str(shared))
    monkeypatch.chdir(here)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(["", "lib"]))
    run_fresh_process(tmp_path / "script" / "script.py", [str(tmp_path / "told")])
    where, folder, paths = (tmp_path / "told").read_text().splitlines()
    assert where == "here"
    assert Path(folder).parent == shared
    assert paths.split(os.pathsep) == [str(here), str(here / "lib")]


def test_accuracy_is_in_percent():
    assert accuracy([1, 0, 2, 2], [1, 1, 2, 0]) == 50.0


@pytest.mark.parametrize("higher", [True, False])
def test_what_is_not_finite_is_never_better(higher):
    nan = float("nan")
    for name in ("loss", "score"):
        assert not is_better({"loss": 1.0, "score": 1.0, name: nan}, None, "score", higher=higher)
    assert is_better({"loss": 1.0, "score": 0.0}, {}, "score", higher=higher)
    assert is_better({"loss": 1.0, "score": 2.0}, {"score": 1.0}, "score", higher=higher) == higher
    assert not is_better({"loss": 1.0, "score": 1.0}, {"score": 1.0}, "score", higher=higher)


def test_what_a_fresh_process_prints_is_shown_and_what_went_wrong_is_raised(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    script = tmp_path / "script.py"
    script.write_text("import sys\nprint('1 of 2 batches', flush=True)\nsys.exit('no such model')")
    with pytest.raises(RuntimeError, match="no such model"):
        run_fresh_process(script, [])
    assert capfd.readouterr().out == "1 of 2 batches\n"
