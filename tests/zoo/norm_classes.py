"""Norm classes of transformers by name, whichever version is installed."""

import importlib
from typing import Any

import pytest
import transformers


def transformers_class(path: str) -> Any:
    """The class at `bert.modeling_bert:BertModel`; skips the test where this version of transformers has none."""
    module, name = path.split(":")
    try:
        return getattr(importlib.import_module(f"transformers.models.{module}"), name)
    except (ModuleNotFoundError, AttributeError):
        pytest.skip(f"transformers {transformers.__version__} has no {path}")
