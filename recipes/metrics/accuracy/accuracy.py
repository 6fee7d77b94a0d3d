"""Accuracy, as a module for `evaluate.load(path)`: needs no network."""

import datasets
import evaluate
import numpy as np


class Accuracy(evaluate.Metric):
    """The share of predictions that equal their reference."""

    def _info(self):
        return evaluate.MetricInfo(
            description="The share of predictions that equal their reference, between 0 and 1.",
            citation="",
            inputs_description="predictions, references: integer class ids of equal number",
            features=datasets.Features(
                {"predictions": datasets.Value("int64"), "references": datasets.Value("int64")}
            ),
        )

    def _compute(self, predictions, references):
        return {"accuracy": float(np.mean(np.asarray(predictions) == np.asarray(references)))}
