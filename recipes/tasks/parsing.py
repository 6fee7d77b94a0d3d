"""Dependency parsing: from the options to transitions to train on, sentences to parse, a vocabulary and a model."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from transformers import AutoModelForSequenceClassification, PreTrainedModel
from transformers.utils import cached_file

from common.checkpoints import write_json
from common.options import OptionError, option
from tasks.arc_standard import UNKNOWN, Encoded, parse, training_examples
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
    max_train_samples: int | None = option(None, "use only the first so many training sentences")
    max_validation_samples: int | None = option(None, "use only the first so many validation sentences")
    max_test_samples: int | None = option(None, "use only the first so many test sentences")
    tag_column: Literal["upos", "xpos"] = option("xpos", "column of the tags: the fourth (UPOS) or the fifth (XPOS)")
    lowercase: bool = option(False, "take words in lower case")
    min_frequency: int = option(2, "a word must occur this often to be in the vocabulary")
    punctuation_tags: list[str] = option(
        PUNCTUATION_TAGS, "words whose fourth column is one of these are punctuation for the scores"
    )


class ParserVocabulary:
    """Words, tags and relations by number; saved beside the model as `vocabulary.json`.

    Words and tags count from 3, after those of no word, of the root and of what is unknown; relations from 1.
    """

    file_name = "vocabulary.json"

    def __init__(
        self, words: Sequence[str], tags: Sequence[str], relations: Sequence[str], *, lowercase: bool = False
    ):
        self.words, self.tags, self.relations, self.lowercase = list(words), list(tags), list(relations), lowercase
        self._words, self._tags = ({name: UNKNOWN + 1 + n for n, name in enumerate(names)} for names in (words, tags))
        self._relations = {name: 1 + n for n, name in enumerate(relations)}

    @classmethod
    def of(cls, sentences: Sequence[Sentence], *, min_frequency: int, lowercase: bool) -> ParserVocabulary:
        """Of a treebank, in the order of frequency, then of the alphabet."""

        def counted(values: Iterable[str], least: int = 1) -> list[str]:
            counts = Counter(values)
            return sorted((name for name in counts if counts[name] >= least), key=lambda name: (-counts[name], name))

        words = (word.lower() if lowercase else word for sentence in sentences for word in sentence.forms)
        tags = (tag for sentence in sentences for tag in sentence.tags)
        relations = (relation for sentence in sentences for relation in sentence.relations)
        return cls(counted(words, min_frequency), counted(tags), counted(relations), lowercase=lowercase)

    def encode(self, sentence: Sentence) -> Encoded:
        """A sentence in numbers."""
        forms = [form.lower() for form in sentence.forms] if self.lowercase else sentence.forms
        return Encoded(
            np.asarray([self._words.get(form, UNKNOWN) for form in forms]),
            np.asarray([self._tags.get(tag, UNKNOWN) for tag in sentence.tags]),
            np.asarray(sentence.heads) if sentence.heads else None,
            np.asarray([self._relations.get(name, 0) for name in sentence.relations]) if sentence.heads else None,
        )

    def names(self, relations: Iterable[int]) -> list[str]:
        """The names of relations by number."""
        return [self.relations[number - 1] for number in relations]

    def transitions(self) -> list[str]:
        """The names of all transitions, in order."""
        return ["SHIFT", *(f"{kind}-{name}" for name in self.relations for kind in ("LEFT", "RIGHT"))]

    def sizes(self) -> dict[str, int]:
        """How many of each a model embeds."""
        rows = {"vocab_size": len(self.words) + UNKNOWN + 1, "num_tags": len(self.tags) + UNKNOWN + 1}
        return {**rows, "num_relations": len(self.relations) + 1}

    def save_pretrained(self, folder: str | Path) -> None:
        """Write `vocabulary.json`."""
        names = ("words", "tags", "relations", "lowercase")
        write_json(Path(folder) / self.file_name, {name: getattr(self, name) for name in names})

    @classmethod
    def from_pretrained(cls, name: str | Path) -> ParserVocabulary:
        """That of a saved model, in a folder or on the Hub. Raises OSError when there is none."""
        return cls(**json.loads(Path(cached_file(str(name), cls.file_name)).read_text(encoding="utf-8")))


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


@torch.inference_mode()
def parse_sentences(
    model: torch.nn.Module, sentences: Sequence[Encoded], *, single_root: bool, batch_size: int
) -> tuple[list[list[int]], list[list[int]]]:
    """Heads and relations, by number, of every word of every sentence; the model is in eval mode already."""
    device = next(model.parameters()).device

    def score(features: np.ndarray) -> np.ndarray:
        return model(input_ids=torch.from_numpy(features).long().to(device)).logits.float().cpu().numpy()

    heads, relations = parse(score, sentences, single_root=single_root, batch_size=batch_size)
    return [values.tolist() for values in heads], [values.tolist() for values in relations]
