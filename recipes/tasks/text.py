"""Text classification, of single texts or of pairs: from the options to tokenized splits and a model."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from transformers import AutoModelForSequenceClassification, AutoTokenizer, PreTrainedModel

from common.batches import Plan, StepPlan
from common.evaluation import main_first
from common.loop import Run
from common.setup import calibration_rows
from common.task import Task
from common.token_batches import TokenPlan
from tasks.data import USE, check_text_column, load_splits, resolve_labels, split_files
from tasks.models import (
    build_fresh,
    check_model_source,
    check_positions,
    fresh_config,
    label_mappings,
    load_classifier,
    load_pretrained,
)
from tasks.tokenization import train_encoder_tokenizer, trained_once


@dataclass(kw_only=True)
class ClassificationTask(Task):
    """Texts or images with a class each.

    `splits` contains `train`, `validation` and, if there is one, `test`, each with a `labels` column. A fresh process
    classifies the `columns` of `raw_test`, the test split as loaded.
    """

    score = "accuracy"
    label = "accuracy (%)"

    names: list[str]  # of the classes, in order
    splits: dict[str, Dataset]
    lengths: dict[str, list[int]]
    raw_test: Dataset | None
    columns: list[str]
    collate: Callable[[list[Any]], dict[str, torch.Tensor]]

    @classmethod
    def outcomes(cls, folder: Path, record: Mapping[str, Any]) -> np.ndarray:
        """Return 1 for each test example that was classified correctly, 0 for the others, and a column of ones."""
        answers = json.loads((folder / "test_predictions.json").read_text(encoding="utf-8"))
        correct = np.equal(answers["predictions"], answers["labels"])
        return np.stack([correct, np.ones_like(correct)], axis=1)

    @classmethod
    def score_of(cls, sums: np.ndarray) -> np.ndarray:
        """Return the accuracy in percent."""
        return 100 * sums[:, 0] / sums[:, 1]

    @classmethod
    def of(cls, plan: Plan, names: Sequence[str], **fields: Any) -> ClassificationTask:
        """Make a task whose training batches are collated by `collate`, unless `fields` contain `train_collate`."""
        splits, collate = fields["splits"], fields["collate"]

        def calibration_batch(model: PreTrainedModel) -> dict[str, torch.Tensor]:
            batch = collate(calibration_rows(splits["train"]))
            return {name: tensor for name, tensor in batch.items() if name != "labels"}

        sizes = ", ".join(f"{len(data):,} to {USE[split]}" for split, data in splits.items())
        return cls(
            names=list(names),
            train_data=splits["train"],
            train_collate=fields.pop("train_collate", lambda epoch: collate),
            plan=plan,
            count=plan.num_examples,
            calibration_batch=calibration_batch,
            summary=f"{len(names)} classes; {sizes}",
            **fields,
        )


def prepare_text(run: Run) -> ClassificationTask:
    """Load and check the data, train or load the tokenizer, tokenize. Raises DataError or OptionError on bad input."""
    options, accelerator = run.options, run.accelerator
    check_model_source(options)
    raw = main_first(accelerator, lambda: load_splits(options))
    columns = [options.text_column, *([options.text_pair_column] if options.text_pair_column else [])]
    check_text_column(raw, options.text_column, "text_column", split_files(options))
    if options.text_pair_column:
        check_text_column(raw, options.text_pair_column, "text_pair_column", split_files(options))
    names, labels = resolve_labels(raw, options.label_column, options.label_names, split_files(options))

    if options.model_name_or_path:
        tokenizer = main_first(accelerator, lambda: load_pretrained(AutoTokenizer, options.model_name_or_path))
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.eos_token
    else:
        texts = (text for column in columns for text in raw["train"][column])
        settings = {
            name: getattr(options, name) for name in ("vocab_size", "min_frequency", "lowercase", "max_length")
        }
        tokenizer = trained_once(run, lambda: train_encoder_tokenizer(texts, kind=options.tokenizer, **settings))
    tokenizer.model_max_length = options.max_length
    # It recommends __call__ over pad. But texts are tokenized once and padded in every batch.
    tokenizer.deprecation_warnings["Asking-to-pad-a-fast-tokenizer"] = True

    def tokenize(rows: dict[str, list[Any]]) -> dict[str, list[Any]]:
        encoded = tokenizer(*(rows[column] for column in columns), truncation=True, max_length=options.max_length)
        return {**encoded, "length": [len(ids) for ids in encoded["input_ids"]]}

    def prepare(split: str) -> Dataset:
        data = raw[split].map(
            tokenize,
            batched=True,
            remove_columns=raw[split].column_names,
            num_proc=options.preprocessing_workers,
            desc=f"Tokenizing {split}",
        )
        return data.add_column("labels", labels[split])

    splits = main_first(accelerator, lambda: {split: prepare(split) for split in raw})
    lengths = {split: data["length"][:] for split, data in splits.items()}
    splits = {split: data.remove_columns("length") for split, data in splits.items()}

    def collate(rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        batch_labels = torch.tensor([row.pop("labels") for row in rows])
        return {**tokenizer.pad(rows, return_tensors="pt"), "labels": batch_labels}

    if options.max_tokens is None:
        plan: Plan = StepPlan(lengths["train"], options.batch_size, **run.division)
    else:
        plan = TokenPlan(lengths["train"], lengths["train"], options.max_tokens, **run.division)
    return ClassificationTask.of(
        plan,
        names,
        pipeline="text-classification",
        auto_class=AutoModelForSequenceClassification,
        processor=tokenizer,
        build_model=lambda: _build_model(options, tokenizer, names),
        splits=splits,
        lengths=lengths,
        raw_test=raw.get("test"),
        columns=columns,
        collate=collate,
    )


def _build_model(options: Any, tokenizer: Any, names: list[str]) -> PreTrainedModel:
    if options.model_name_or_path:
        model = load_classifier(AutoModelForSequenceClassification, options.model_name_or_path, names)
    else:
        special = {"vocab_size": len(tokenizer), "pad_token_id": tokenizer.pad_token_id}
        config = fresh_config(options, **special, **label_mappings(names))
        model = build_fresh(AutoModelForSequenceClassification, config)
    check_positions(model, options.max_length, "max_length")
    # Decoders find a text's last token by it: with another padding, the class would depend on the batch.
    model.config.pad_token_id = tokenizer.pad_token_id
    return model
