"""Text classification, of single texts or of pairs: from the options to tokenised splits and a model."""

from __future__ import annotations

import inspect
import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from transformers import (
    CONFIG_MAPPING,
    AutoConfig,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
)

from common.batches import Plan, StepPlan
from common.checkpoints import save_folder
from common.evaluation import main_first
from common.loop import Run
from common.options import OptionError, did_you_mean
from common.setup import calibration_rows
from common.task import Task
from common.token_batches import TokenPlan
from tasks.data import USE, check_text_column, load_splits, resolve_labels
from tasks.tokenization import train_encoder_tokenizer


@dataclass(kw_only=True)
class ClassificationTask(Task):
    """Texts or images with a class each.

    `splits` holds `train`, `validation` and, when there is one, `test`, each with a `labels` column; `raw_test` is the
    test split as it was loaded, of which the `columns` are what is classified, for prediction in a fresh process.
    """

    score = "accuracy"
    label = "accuracy (%)"
    scale = 100.0

    splits: dict[str, Dataset]
    lengths: dict[str, list[int]]
    raw_test: Dataset | None
    columns: list[str]
    collate: Callable[[list[Any]], dict[str, torch.Tensor]]

    @classmethod
    def per_example(cls, folder: Path, record: Mapping[str, Any]) -> tuple[np.ndarray, Callable[[np.ndarray], Any]]:
        answers = json.loads((folder / "test_predictions.json").read_text(encoding="utf-8"))
        correct = np.equal(answers["predictions"], answers["labels"])
        return np.stack([correct, np.ones_like(correct)], axis=1), lambda sums: 100 * sums[:, 0] / sums[:, 1]

    @classmethod
    def of(cls, plan: Plan, names: Sequence[str], **fields: Any) -> ClassificationTask:
        """A task whose training batches are collated as `collate` does, unless `fields` say how."""
        splits, collate = fields["splits"], fields["collate"]

        def calibration_batch(model: PreTrainedModel) -> dict[str, torch.Tensor]:
            batch = collate(calibration_rows(splits["train"]))
            return {name: tensor for name, tensor in batch.items() if name != "labels"}

        sizes = ", ".join(f"{len(data):,} to {USE[split]}" for split, data in splits.items())
        return cls(
            train_data=splits["train"],
            train_collate=fields.pop("train_collate", lambda epoch: collate),
            plan=plan,
            count=plan.num_examples,
            calibration_batch=calibration_batch,
            summary=f"{len(names)} classes; {sizes}",
            **fields,
        )


def check_model_source(options: Any) -> None:
    """Raise OptionError unless the model is either pretrained or fresh."""
    if bool(options.model_name_or_path) == bool(options.model_config):
        raise OptionError("give either --model_name_or_path or model_config (with a model_type), not both or none")


def label_mappings(names: Sequence[str]) -> dict[str, Any]:
    """What a model's config says of the classes."""
    return {
        "num_labels": len(names),
        "id2label": dict(enumerate(names)),
        "label2id": {name: number for number, name in enumerate(names)},
    }


def fresh_config(options: Any, **values: Any) -> PreTrainedConfig:
    """The config of a fresh model: `values`, then `model_config`, which must name a model_type.

    Raises OptionError for an unknown model_type, for a field that its config does not have, and for one that does not
    go with `values`.
    """
    sizes = dict(options.model_config)
    model_type = sizes.pop("model_type", None)
    if model_type is None:
        raise OptionError("model_config needs a model_type, for instance bert")
    if model_type not in CONFIG_MAPPING:
        hint = did_you_mean(model_type, CONFIG_MAPPING)
        raise OptionError(f"model_config: transformers has no model_type {model_type!r}{hint}")
    try:
        config = AutoConfig.for_model(model_type, **{**values, **sizes})
    except Exception as error:  # transformers checks fields by classes of its own
        raise OptionError(f"model_config of {model_type}: {' '.join(str(error).split())}") from error
    known = _fields(model_type) | values.keys()
    for name, value in sizes.items():
        if len(known) > len(values) and name not in known and not _has_effect(config, name, {**values, **sizes}):
            hint = did_you_mean(name, sorted(known))
            raise OptionError(f"model_config: {model_type} has no field {name!r}{hint}")
        if isinstance(value, int) and value < 0 and re.search(r"^(num|n)_|_(size|dim|layers)$", name):
            raise OptionError(f"model_config: {name} must not be negative, got {value}")
        if name == "pad_token_id" and values.get(name) not in (None, value):
            raise OptionError(f"model_config: {name} is {values[name]} in the tokeniser, not {value}: leave it out")
    if sizes.get("vocab_size", math.inf) < values.get("vocab_size", 0):
        raise OptionError(
            f"model_config: vocab_size {sizes['vocab_size']} is less than the tokeniser's {values['vocab_size']}: "
            "leave it out"
        )
    return config


def _fields(model_type: str) -> set[str]:
    """What a config of this type takes; nothing where it has no defaults to tell it by."""
    try:
        config = AutoConfig.for_model(model_type)
    except Exception:  # of whatever kind the config makes of no arguments
        return set()
    # Some are properties, and the attention is chosen by a name that no attribute has.
    return {*vars(config), *dir(type(config)), *config.attribute_map, "attn_implementation", "torch_dtype"}


def _has_effect(config: PreTrainedConfig, name: str, given: dict[str, Any]) -> bool:
    """Whether a field that the config does not declare is one all the same: it changes others (`rope_theta`), or the
    model's code reads it (`position_buckets`)."""
    without = AutoConfig.for_model(config.model_type, **{key: value for key, value in given.items() if key != name})
    fields = {key: value for key, value in config.to_dict().items() if key != name}
    if fields != without.to_dict():
        return True
    code = Path(inspect.getfile(type(config)))
    modeling = code.with_name(code.name.replace("configuration_", "modeling_"))
    return modeling.is_file() and re.search(rf"\b{re.escape(name)}\b", modeling.read_text("utf-8")) is not None


def build_fresh(auto_class: Any, config: PreTrainedConfig) -> PreTrainedModel:
    """A fresh model. Raises OptionError, in the model's own words, for a config that it cannot be built from."""
    try:
        return auto_class.from_config(config)
    except OptionError:
        raise
    except Exception as error:  # of whatever kind the model makes of it
        said = f"{type(error).__name__}: {' '.join(str(error).split())}"
        raise OptionError(f"model_config: no {config.model_type} can be built from it: {said}") from error


def load_pretrained(auto_class: Any, name: str, **options: Any) -> Any:
    """What `auto_class` loads by `name`. Raises OptionError naming the option when there is no such thing."""
    try:
        return auto_class.from_pretrained(name, **options)
    except OSError as error:
        said = str(error).strip().splitlines()
        raise OptionError(f"--model_name_or_path {name}: {said[0] if said else type(error).__name__}") from error


def prepare_text(run: Run) -> ClassificationTask:
    """Load and check the data, train or load the tokeniser, tokenise. The options are TextOptions and ModelOptions.

    Raises DataError or OptionError for whatever would stop the training later.
    """
    options, accelerator = run.options, run.accelerator
    check_model_source(options)
    raw = main_first(accelerator, lambda: load_splits(options))
    columns = [options.text_column, *([options.text_pair_column] if options.text_pair_column else [])]
    check_text_column(raw, options.text_column, "text_column")
    if options.text_pair_column:
        check_text_column(raw, options.text_pair_column, "text_pair_column")
    names, labels = resolve_labels(raw, options.label_column, options.label_names)

    if options.model_name_or_path:
        tokenizer = main_first(accelerator, lambda: load_pretrained(AutoTokenizer, options.model_name_or_path))
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.eos_token
    else:
        tokenizer = _trained_tokenizer(raw["train"], columns, run)
    tokenizer.model_max_length = options.max_length
    # It recommends __call__ over pad, which does not apply: texts are tokenised once and padded in every batch.
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
            desc=f"Tokenising {split}",
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


def _trained_tokenizer(data: Dataset, columns: list[str], run: Run) -> Any:
    options, folder = run.options, run.output_dir / "tokenizer"
    if run.is_main and not (run.resuming and folder.exists()):
        tokenizer = train_encoder_tokenizer(
            (text for column in columns for text in data[column]),
            kind=options.tokenizer,
            vocab_size=options.vocab_size,
            min_frequency=options.min_frequency,
            lowercase=options.lowercase,
            max_length=options.max_length,
        )
        save_folder(tokenizer.save_pretrained, folder)
    run.accelerator.wait_for_everyone()
    return AutoTokenizer.from_pretrained(folder)


def _build_model(options: Any, tokenizer: Any, names: list[str]) -> PreTrainedModel:
    labels = label_mappings(names)
    if options.model_name_or_path:
        model = load_pretrained(AutoModelForSequenceClassification, options.model_name_or_path, **labels)
    else:
        special = {"vocab_size": len(tokenizer), "pad_token_id": tokenizer.pad_token_id}
        config = fresh_config(options, **special, **labels)
        model = build_fresh(AutoModelForSequenceClassification, config)
    positions = getattr(model.config, "max_position_embeddings", None)
    for name, module in model.named_modules():
        if positions and name.endswith("position_embeddings") and getattr(module, "padding_idx", None) is not None:
            positions -= module.padding_idx + 1  # as RoBERTa counts, the first position comes after that of padding
    if positions is not None and positions < options.max_length:
        raise OptionError(f"--max_length {options.max_length} is beyond the model's {positions} positions")
    if model.config.pad_token_id is None:
        model.config.pad_token_id = tokenizer.pad_token_id
    return model
