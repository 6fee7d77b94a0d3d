"""Dependency parsing: from the options to transitions to train on, sentences to parse, a vocabulary and a model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from transformers import AutoModelForSequenceClassification, PreTrainedModel

from common.options import OptionError, option
from tasks.arc_standard import Encoded, ParserVocabulary, training_examples
from tasks.conllu import PUNCTUATION_TAGS, Sentence, read_conllu
from tasks.data import DataError
from tasks.text import build_fresh, check_model_source, fresh_config, label_mappings, load_pretrained
from tasks.transition_parser import TransitionParserConfig


@dataclass(kw_only=True)
class ParsingDataOptions:
    """A treebank, and how words and tags are taken from it."""

    train_file: str | None = option(None, "treebank in CoNLL-U or CoNLL-X, plain or .gz")
    validation_file: str | None = option(None, "treebank to choose the best checkpoint on")
    test_file: str | None = option(None, "treebank for the final test")
    score_test: bool = option(True, "score the best model on the test split at the end")
    max_train_samples: int | None = option(None, "use only the first so many training sentences", within="(0, inf)")
    max_validation_samples: int | None = option(
        None, "use only the first so many validation sentences", within="(0, inf)"
    )
    max_test_samples: int | None = option(None, "use only the first so many test sentences", within="(0, inf)")
    tag_column: Literal["upos", "xpos"] = option("xpos", "column of the tags: the fourth (UPOS) or the fifth (XPOS)")
    lowercase: bool = option(False, "take words in lower case")
    min_frequency: int = option(2, "a word must occur this often to be in the vocabulary", within="[0, inf)")
    punctuation_tags: list[str] = option(
        PUNCTUATION_TAGS, "words whose fourth column is one of these are punctuation for the scores"
    )


class Transitions:
    """The oracle's transitions as a data set: features (48,) and the transition, or many of both at a time."""

    def __init__(self, sentences: Sequence[Encoded]):
        self.features, self.transitions = training_examples(sentences)

    def __len__(self) -> int:
        return len(self.transitions)

    def __getitem__(self, index: int) -> tuple[np.ndarray, int]:
        return self.features[index], self.transitions[index]

    def __getitems__(self, indices: list[int]) -> tuple[np.ndarray, np.ndarray]:
        return self.features[indices], self.transitions[indices]


def collate_transitions(rows: tuple[np.ndarray, np.ndarray]) -> dict[str, torch.Tensor]:
    """`input_ids` (batch, 48) and `labels` (batch,) of what `Transitions` gives for a list of indices."""
    return {"input_ids": torch.from_numpy(rows[0]).long(), "labels": torch.from_numpy(rows[1]).long()}


@dataclass
class ParsingTask:
    """What the training loop needs: transitions to train on and to take the loss of, sentences to parse."""

    gold: dict[str, list[Sentence]]
    encoded: dict[str, list[Encoded]]
    examples: dict[str, Transitions]
    left_out: dict[str, int]  # sentences of a split that are no examples: not projective, or with unknown relations
    vocabulary: ParserVocabulary
    build_model: Callable[[], PreTrainedModel]


def prepare_parsing(options: Any) -> ParsingTask:
    """Read and check the treebank, number it, run the oracle over it. `options` has ParsingDataOptions, ModelOptions.

    Raises DataError or OptionError for whatever would stop the training later.
    """
    check_model_source(options)
    gold: dict[str, list[Sentence]] = {}
    for split in ("train", "validation", "test"):
        file, limit = getattr(options, f"{split}_file"), getattr(options, f"max_{split}_samples")
        if file is not None and (split != "test" or options.score_test):
            gold[split] = read_conllu(file, tag_column=options.tag_column)[:limit]
        elif split != "test":
            raise DataError(f"--{split}_file is missing: a treebank to {split.removesuffix('ion')} on")
    if options.model_name_or_path:
        vocabulary = load_pretrained(ParserVocabulary, options.model_name_or_path)
    else:
        vocabulary = ParserVocabulary.of(
            gold["train"], min_frequency=options.min_frequency, lowercase=options.lowercase
        )
    encoded = {split: [vocabulary.encode(sentence) for sentence in sentences] for split, sentences in gold.items()}
    learnable = {split: [s for s in encoded[split] if s.has_oracle] for split in ("train", "validation")}
    if not learnable["train"]:
        raise DataError(f"{options.train_file}: none of {len(gold['train'])} trees is projective: nothing to learn")
    single_root = all(sentence.heads.count(0) == 1 for sentence in gold["train"])

    def build_model() -> PreTrainedModel:
        if options.model_name_or_path:
            return load_pretrained(AutoModelForSequenceClassification, options.model_name_or_path)
        reading = {"tag_column": options.tag_column, "single_root": single_root}
        names = label_mappings(vocabulary.transitions())
        config = fresh_config(options, **vocabulary.sizes(), **reading, **names)
        if config.model_type != TransitionParserConfig.model_type:
            raise OptionError(f"model_config: a parser's model_type is {TransitionParserConfig.model_type}")
        return build_fresh(AutoModelForSequenceClassification, config)

    return ParsingTask(
        gold=gold,
        encoded=encoded,
        examples={split: Transitions(sentences) for split, sentences in learnable.items()},
        left_out={split: len(gold[split]) - len(sentences) for split, sentences in learnable.items()},
        vocabulary=vocabulary,
        build_model=build_model,
    )
