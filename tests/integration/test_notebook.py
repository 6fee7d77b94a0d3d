"""The notebook runs from top to bottom, offline, and is committed as it ran."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

nbformat = pytest.importorskip("nbformat", reason="running the notebook needs nbformat")
nbclient = pytest.importorskip("nbclient", reason="running the notebook needs nbclient and ipykernel")
pytest.importorskip("ipykernel", reason="running the notebook needs ipykernel")
pytest.importorskip("matplotlib", reason="the notebook draws")
pytest.importorskip("datasets", reason="the notebook uses the recipes' tokenizer")

PATH = Path(__file__).parents[2] / "recipes" / "notebooks" / "quickstart.ipynb"


@pytest.fixture(scope="module")
def committed():
    return nbformat.read(PATH, as_version=4)


def code_cells(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def texts(notebook):
    for cell in code_cells(notebook):
        for output in cell.outputs:
            yield output.get("text", "") + "".join(str(v) for k, v in output.get("data", {}).items() if "text" in k)


STEPS = "NUM_STEPS, BATCH_SIZE = 150, 32"  # of which few are enough to see that everything runs


def test_runs_from_top_to_bottom_offline(committed, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    notebook = nbformat.from_dict(committed)
    for cell in code_cells(notebook):
        cell.outputs = []
        cell.source = cell.source.replace(STEPS, STEPS.replace("150", "30"))
    # a cell that raises ends the run with CellExecutionError
    nbclient.NotebookClient(notebook, timeout=480, resources={"metadata": {"path": str(PATH.parent)}}).execute()
    shown = "\n".join(texts(notebook))
    assert shown.count("validation accuracy") == 4
    pictures = [o for cell in code_cells(notebook) for o in cell.outputs if "image/png" in o.get("data", {})]
    assert len(pictures) == 5
    assert shown.count("True") == 2  # unpatching and reloading


def test_committed_as_it_ran_and_without_paths_of_a_machine(committed):
    assert STEPS in "\n".join(cell.source for cell in code_cells(committed))
    accuracies = [float(number) for number in re.findall(r"validation accuracy ([\d.]+)", "\n".join(texts(committed)))]
    assert len(accuracies) == 4
    assert max(accuracies) > 0.3  # chance is below 0.2
    assert [cell.execution_count for cell in code_cells(committed)] == list(range(1, len(code_cells(committed)) + 1))
    assert not any(output.output_type == "error" for cell in code_cells(committed) for output in cell.outputs)
    assert not re.search(r"(?<![\w.])/(work|root|home|tmp|Users)/", "\n".join(texts(committed)))
    assert PATH.stat().st_size < 500_000
