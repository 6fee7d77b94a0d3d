"""Dependency parsing: from the options to transitions to train on, sentences to parse, a vocabulary and a model."""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoConfig, AutoModelForSequenceClassification, PreTrainedModel

from common.batches import StepPlan
from common.loop import Run
from common.options import OptionError
from common.setup import calibration_rows
from common.task import Task
from tasks.arc_standard import Encoded, ParserVocabulary, training_examples
from tasks.conllu import Sentence, check_forms, check_tags, read_conllu
from tasks.data import DataError
from tasks.models import build_fresh, check_model_source, fresh_config, label_mappings, load_model, load_pretrained
from tasks.transition_parser import TransitionParserConfig


class Transitions:
    """The oracle's transitions as a data set: features (examples, 48) and transitions (examples,)."""

    def __init__(self, sentences: Sequence[Encoded]):
        self.features, self.transitions = training_examples(sentences)

    def __len__(self) -> int:
        return len(self.transitions)

    def __getitem__(self, index: int) -> tuple[np.ndarray, int]:
        return self.features[index], self.transitions[index]

    def __getitems__(self, indices: list[int]) -> tuple[np.ndarray, np.ndarray]:
        return self.features[indices], self.transitions[indices]


def collate_transitions(rows: tuple[np.ndarray, np.ndarray]) -> dict[str, torch.Tensor]:
    """Return `input_ids` (batch, 48) and `labels` (batch,) of examples of `Transitions`."""
    return {"input_ids": torch.from_numpy(rows[0]).long(), "labels": torch.from_numpy(rows[1]).long()}


@dataclass(kw_only=True)
class ParsingTask(Task):
    """A treebank to train a parser on: sentences to parse, and the oracle's transitions of those that have one."""

    score = "uas_without_punctuation"
    label = "UAS without punctuation (%)"
    unit = "transitions/s"
    use = "python recipes/predict.py --task parsing --model {model} --data raw.conllu --output parsed.conllu"

    gold: dict[str, list[Sentence]]
    encoded: dict[str, list[Encoded]]
    examples: dict[str, Transitions]
    left_out: dict[str, int]  # skipped sentences of a split: not projective, or with unknown relations
    vocabulary: ParserVocabulary
    sentences_per_second: float | None = None  # parsed in the last evaluation

    @classmethod
    def outcomes(cls, folder: Path, record: Mapping[str, Any]) -> np.ndarray:
        """Return the correct heads and the words of each test sentence, without punctuation."""
        counts = np.asarray(json.loads((folder / "test_trees.json").read_text(encoding="utf-8"))["counts"])
        return counts[:, 1, [1, 0]]

    @classmethod
    def score_of(cls, sums: np.ndarray) -> np.ndarray:
        """Return the unlabeled attachment score in percent."""
        return 100 * sums[:, 0] / sums[:, 1]


def prepare_parsing(run: Run) -> ParsingTask:
    """Read, check and number the treebank, and run the oracle. Raises DataError or OptionError on bad input."""
    options = run.options
    check_model_source(options)
    if options.model_name_or_path:
        vocabulary = load_pretrained(ParserVocabulary, options.model_name_or_path)
        column = load_pretrained(AutoConfig, options.model_name_or_path).tag_column
        for name, known in (("tag_column", column), ("lowercase", vocabulary.lowercase)):
            if known != getattr(options, name):
                given = f"--{name} {str(known).lower()}"
                raise OptionError(f"--model_name_or_path {options.model_name_or_path}: trained with {given}: give it")
    gold: dict[str, list[Sentence]] = {}
    for split in ("train", "validation", "test"):
        file, limit = getattr(options, f"{split}_file"), getattr(options, f"max_{split}_samples")
        if file is not None and (split != "test" or options.score_test):
            gold[split] = read_conllu(file, tag_column=options.tag_column)[:limit]
            check_forms(gold[split], file)
            check_tags(gold[split], file, options.tag_column)
            coarse_tags = {tag for sentence in gold[split] for tag in sentence.coarse_tags}
            if split != "train" and coarse_tags.isdisjoint(options.punctuation_tags):
                warnings.warn(
                    f"{file}: column 4 holds none of --punctuation_tags {options.punctuation_tags}; it holds "
                    f"{', '.join(sorted(coarse_tags)[:20])}: excluding punctuation has no effect here",
                    stacklevel=2,
                )
        elif split != "test":
            raise DataError(f"--{split}_file is missing: a treebank to {split.removesuffix('ion')} on")
    if not options.model_name_or_path:
        vocabulary = ParserVocabulary.of(
            gold["train"], min_frequency=options.min_frequency, lowercase=options.lowercase
        )
    encoded = {split: [vocabulary.encode(sentence) for sentence in sentences] for split, sentences in gold.items()}
    learnable = {split: [s for s in encoded[split] if s.has_oracle] for split in ("train", "validation")}
    for split, sentences in learnable.items():
        if not sentences:
            raise DataError(f"{getattr(options, f'{split}_file')}: none of {len(gold[split])} trees is projective")
    examples = {split: Transitions(sentences) for split, sentences in learnable.items()}
    left_out = {split: len(gold[split]) - len(sentences) for split, sentences in learnable.items()}
    single_root = all(sentence.heads.count(0) == 1 for sentence in gold["train"])

    def build_model() -> PreTrainedModel:
        if options.model_name_or_path:
            model = load_model(AutoModelForSequenceClassification, options.model_name_or_path)
            model.config.single_root = single_root
            return model
        reading = {"tag_column": options.tag_column, "single_root": single_root}
        names = label_mappings(vocabulary.transitions())
        config = fresh_config(options, **vocabulary.sizes(), **reading, **names)
        if config.model_type != TransitionParserConfig.model_type:
            raise OptionError(f"model_config: a parser's model_type is {TransitionParserConfig.model_type}")
        return build_fresh(AutoModelForSequenceClassification, config)

    def calibration_batch(_: Any) -> dict[str, torch.Tensor]:
        features, _transitions = zip(*calibration_rows(examples["train"]), strict=True)
        return {"input_ids": torch.from_numpy(np.stack(features)).long()}

    return ParsingTask(
        pipeline="token-classification",
        auto_class=AutoModelForSequenceClassification,
        processor=vocabulary,
        train_data=examples["train"],
        train_collate=lambda epoch: collate_transitions,
        plan=StepPlan([1] * len(examples["train"]), options.batch_size, **run.division),
        count=len,
        build_model=build_model,
        calibration_batch=calibration_batch,
        summary=(
            f"{len(examples['train']):,} transitions of {len(learnable['train']):,} sentences to train on; of "
            f"{len(gold['train']):,} and {len(gold['validation']):,} sentences {left_out['train']:,} and "
            f"{left_out['validation']:,} are skipped, as they are not projective or have unknown relations"
        ),
        gold=gold,
        encoded=encoded,
        examples=examples,
        left_out=left_out,
        vocabulary=vocabulary,
    )
