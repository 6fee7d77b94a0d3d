"""Describes a task for the loop, for comparisons and for reports."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch

from common.batches import Plan


@dataclass(kw_only=True)
class Task:
    """What a run trains, and how its runs are scored. Subclasses add what the recipe itself needs.

    The class contains the `score` that runs are compared by, with a label, scale and decimals for tables. It also
    contains the options that hide the test split, the `unit` of speed, and how to `use` the best model. `outcomes` and
    `score_of` serve tests of significance. An instance contains the data of one run. A step's loss is divided by
    `count(step)`; `pipeline` is the Hub's name of the task.
    """

    score: ClassVar[str]
    label: ClassVar[str]
    scale: ClassVar[float] = 1.0
    decimals: ClassVar[int] = 2
    higher_is_better: ClassVar[bool] = True
    without_test: ClassVar[dict[str, str]] = {"score_test": "false"}
    unit: ClassVar[str] = "samples/s"
    use: ClassVar[str] = 'import hf_adanorm; pipeline("{pipeline}", "{model}")'

    pipeline: str
    auto_class: Any
    processor: Any  # saved with the model
    train_data: Any
    train_collate: Callable[[int], Callable[[list[Any]], Any]]  # of an epoch
    plan: Plan
    count: Callable[[Any], int]
    build_model: Callable[[], Any]
    calibration_batch: Callable[[Any], dict[str, torch.Tensor]]  # what the model is given, of training examples
    summary: str  # of the data, for the log

    @classmethod
    def selection(cls, options: Any) -> tuple[str, bool]:
        """Return the validation score that chooses checkpoints and hyperparameters, and whether higher is better."""
        name = getattr(options, "best_metric", cls.score)
        return name, cls.higher_is_better if name == cls.score else name != "loss"

    @classmethod
    def outcomes(cls, folder: Path, record: Mapping[str, Any]) -> np.ndarray:
        """Return what the score needs of each test example, (examples, values), from the files of a finished
        run."""
        raise NotImplementedError

    @classmethod
    def score_of(cls, sums: np.ndarray) -> np.ndarray:
        """Return the scores, (samples,), of sums of such rows, (samples, values)."""
        raise NotImplementedError
