"""One thread a process: the tests share few cores, and one thread makes results the same on every machine."""

import atexit
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.pop("COLUMNS", None)  # tables are as wide as without a terminal; pytest-xdist sets it
# Processes side by side would write each other's code of models.
os.environ["HF_MODULES_CACHE"] = tempfile.mkdtemp()

import pytest
import torch
from hypothesis import settings

from tests.zoo.processes import Scripts

ROOT = str(Path(__file__).parents[1])
atexit.register(shutil.rmtree, os.environ["HF_MODULES_CACHE"], ignore_errors=True)
torch.set_num_threads(1)
# How long an example takes says nothing on a busy machine.
settings.register_profile("any-machine", deadline=None)
settings.load_profile("any-machine")


@pytest.fixture(scope="session")
def elsewhere(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Scripts]:
    """Run code where hf_adanorm cannot be imported; transformers is imported once for all of it."""
    folder = tmp_path_factory.mktemp("without")
    modules = ["torch", "transformers.modeling_utils", "transformers.models.bert.modeling_bert"]
    with Scripts(modules, folder, {"HF_HUB_OFFLINE": "1", "PYTHONPATH": ROOT}, hidden="hf_adanorm") as scripts:
        yield scripts
