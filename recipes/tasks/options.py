"""The options of the recipes, apart from what they do: reading them imports no torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from common.options import OptimizationOptions, PatchOptions, RunOptions, option


@dataclass(kw_only=True)
class FileOptions:
    """Local files to train on, to choose the best checkpoint on, and for the final test."""

    train_file: str | None = option(None, "json, jsonl, csv, tsv or parquet file (or .gz of it), or MNIST's IDX file")
    validation_file: str | None = option(None, "file to choose the best checkpoint on")
    test_file: str | None = option(None, "file for the final test")
    max_train_samples: int | None = option(None, "use only the first N training examples", within="(0, inf)")
    max_validation_samples: int | None = option(None, "use only the first N validation examples", within="(0, inf)")
    max_test_samples: int | None = option(None, "use only the first N test examples", within="(0, inf)")


@dataclass(kw_only=True)
class DataOptions(FileOptions):
    """Where the examples come from: a data set on the Hub, or local files, which win."""

    dataset_name: str | None = option(None, "data set on the Hub")
    dataset_config: str | None = option(None, "its configuration")
    train_split: str = option("train", "its split to train on")
    validation_split: str | None = option("validation", "its split to choose the best checkpoint on")
    test_split: str | None = option("test", "its split for the final test")
    preprocessing_workers: int | None = option(None, "processes that tokenize", changes="nothing", within="[0, inf)")


@dataclass(kw_only=True)
class TextOptions(DataOptions):
    """Columns and tokenizer of a text classification task."""

    text_column: str = option("text", "column of the text")
    text_pair_column: str | None = option(None, "column of the second text, for sentence pairs")
    label_column: str = option("label", "column of the class: integers from 0, or names")
    split_sizes: list[int] | None = option(None, "sizes of train, validation and test, drawn at random from all data")
    score_test: bool = option(True, "score the best model on the test split at the end")
    label_names: list[str] | None = option(None, "the classes in order; by default taken from the training data")
    max_length: int = option(128, "longest text in tokens; the rest is cut off", within="[3, inf)")
    tokenizer: Literal["word", "bpe"] = option("word", "tokenizer to train for a fresh model")
    vocab_size: int = option(30000, "largest size of its vocabulary", within="[10, inf)")
    min_frequency: int = option(2, "a word must occur this often to be in its vocabulary", within="[0, inf)")
    lowercase: bool = option(True, "whether it lower-cases")


@dataclass(kw_only=True)
class ModelOptions:
    """The model: a pretrained one, or a fresh one built from a config."""

    model_name_or_path: str | None = option(None, "pretrained model on the Hub or in a folder")
    model_config: dict[str, Any] = option({}, "config of a fresh model: model_type and any of its fields")


@dataclass(kw_only=True)
class ImageOptions:
    """Images and their augmentation in training (task: image)."""

    image_column: str = option("image", "column of the image: an image, its bytes or its path")
    image_size: int | None = option(None, "side that images are scaled to; by default the model's", within="(0, inf)")
    random_crop_padding: int = option(0, "pad by N pixels and crop back at a random place", within="[0, inf)")
    random_resized_crop: float | None = option(None, "crop a random part of at least this share", within="(0, 1]")
    horizontal_flip: bool = option(False, "mirror every second image")


@dataclass(kw_only=True)
class ClassificationOptions(RunOptions, OptimizationOptions, TextOptions, ImageOptions, ModelOptions, PatchOptions):
    """Options of the classification recipe."""

    demo: ClassVar[str] = "demo.yaml"
    task: Literal["text", "image"] = option("text", "what is classified: texts, or pairs of them, or images")
    batch_size: int = option(32, "training examples a micro-batch on each process", within="(0, inf)")
    max_tokens: int | None = option(
        None, "most tokens of a micro-batch of texts, padding included; wins over batch_size", within="(0, inf)"
    )
    eval_batch_size: int = option(64, "examples a batch on each process in evaluation", within="(0, inf)")


@dataclass(kw_only=True)
class ParallelOptions(DataOptions):
    """Languages and cleaning of the sentence pairs. In a local file's name, `{lang}` stands for either language."""

    source_lang: str = option("de", "language to translate from: a column, or `{lang}` in file names")
    target_lang: str = option("en", "language to translate to")
    translation_column: str | None = option(
        None, "column that contains both languages by name, as in translation data sets of the Hub"
    )
    text_preparation: Literal["none", "moses"] = option("none", "moses: tokenize by Moses's rules first (IWSLT14)")
    hold_out_every: int | None = option(
        None, "take every Nth pair of the training data for validation (IWSLT14: 23)", within="[2, inf)"
    )
    max_length_ratio: float | None = option(
        None, "skip training pairs whose numbers of words differ by more than this factor", within="[1, inf)"
    )
    max_words: int | None = option(None, "skip training pairs with more words than this", within="[1, inf)")


@dataclass(kw_only=True)
class TranslationDataOptions(ParallelOptions):
    """Tokenizer and lengths."""

    vocab_size: int = option(8000, "size of the joint BPE vocabulary trained for a fresh model", within="[10, inf)")
    lowercase: bool = option(False, "whether the trained tokenizer lower-cases, both languages")
    max_source_length: int = option(128, "longest source in tokens; the rest is cut off", within="[2, inf)")
    max_target_length: int = option(128, "longest target in tokens; the rest is cut off", within="[2, inf)")
    source_lang_code: str | None = option(None, "source language as a multilingual tokenizer names it, such as de_DE")
    target_lang_code: str | None = option(None, "target language as such a tokenizer names it")
    source_prefix: str = option("", "put before every source text, for instance for T5")
    cache_dir: str | None = option(None, "cache of tokenized splits; by default that of datasets", changes="nothing")


@dataclass(kw_only=True)
class TranslationModelOptions(ModelOptions):
    """The model: a pretrained one, or a fresh one built from a config."""

    dropout: float | None = option(None, "dropout; by default what the model's config says", within="[0, 1)")
    attention_dropout: float | None = option(None, "dropout of attention weights", within="[0, 1)")
    activation_dropout: float | None = option(None, "dropout after the feed-forward activation", within="[0, 1)")
    initialization: Literal["model", "xavier", "kaiming"] = option(
        "model", "of a fresh model: its own; Xavier (fairseq); or Xavier with Kaiming for the attention (the paper)"
    )


@dataclass(kw_only=True)
class TranslationOptions(
    RunOptions, OptimizationOptions, TranslationDataOptions, TranslationModelOptions, PatchOptions
):
    """Options of the translation recipe."""

    needs: ClassVar[tuple[str, ...]] = ("sacrebleu", "sacremoses")
    demo: ClassVar[str] = "demo_en_de.yaml"
    max_tokens: int = option(
        4096, "most tokens of a micro-batch on each process, source or target, padding included", within="(0, inf)"
    )
    label_smoothing: float = option(0.1, "share of the target probability spread over the vocabulary", within="[0, 1)")
    eval_batch_size: int = option(64, "sentences a batch on each process in evaluation", within="(0, inf)")
    num_beams: int = option(5, "beams of the search", within="(0, inf)")
    length_penalty: float = option(1.0, "a beam's score is divided by its length to this power")
    validation_search_samples: int | None = option(
        None, "translate only the first N validation sentences during training; the loss is of all", within="(0, inf)"
    )
    best_metric: Literal["loss", "sacrebleu", "sacrebleu_lowercase", "bleu_tokenized_lowercase", "chrf"] = option(
        "sacrebleu", "validation score that chooses the best checkpoint"
    )
    average_checkpoints: int = option(0, "also test the mean of the last N checkpoints", within="[0, inf)")


@dataclass(kw_only=True)
class ByteDataOptions:
    """A text file, read as bytes. Validation and test are its end, as usual for enwik8, or separate files."""

    train_file: str | None = option(None, "text file: plain, .gz, .bz2, or .zip of one file")
    validation_file: str | None = option(None, "separate validation file, instead of the end of train_file")
    test_file: str | None = option(None, "separate test file, instead of the end of train_file")
    test_characters: int | None = option(5_000_000, "last bytes of train_file to test on", within="[0, inf)")
    validation_characters: int | None = option(5_000_000, "bytes before these to validate on", within="[0, inf)")
    score_test: bool = option(True, "score the best model on the test split at the end")
    max_train_characters: int | None = option(None, "use only the first N training bytes", within="(0, inf)")
    sequence_length: int = option(512, "bytes in one input of the model", within="(0, inf)")
    eval_stride: int = option(256, "bytes scored in each window, the rest is context; not for a memory")
    max_validation_samples: int | None = option(None, "score only N windows during training", within="(0, inf)")


@dataclass(kw_only=True)
class LanguageModelingOptions(RunOptions, OptimizationOptions, ByteDataOptions, ModelOptions, PatchOptions):
    """Options of the language modeling recipe."""

    demo: ClassVar[str] = "enwik_sample.yaml --train_file A_TEXT"
    batch_size: int = option(16, "training segments a micro-batch on each process", within="(0, inf)")
    eval_batch_size: int = option(
        32, "windows a batch on each process in evaluation; with a memory, streams of all processes", within="(0, inf)"
    )


# The universal tag of punctuation, and the tags of the Penn Treebank that count as such.
PUNCTUATION_TAGS = ["PUNCT", "``", "''", ":", ",", "."]


@dataclass(kw_only=True)
class ParsingOptions(RunOptions, OptimizationOptions, FileOptions, ModelOptions, PatchOptions):
    """Options of the parsing recipe: a treebank, and how words and tags are taken from it."""

    demo: ClassVar[str] = "ud_ewt.yaml --train_file A_TREEBANK --validation_file ANOTHER"
    train_file: str | None = option(None, "treebank in CoNLL-U or CoNLL-X, plain or .gz")
    score_test: bool = option(True, "score the best model on the test split at the end")
    tag_column: Literal["upos", "xpos"] = option("xpos", "column of the tags: the fourth (UPOS) or the fifth (XPOS)")
    lowercase: bool = option(False, "take words in lower case")
    min_frequency: int = option(2, "a word must occur this often to be in the vocabulary", within="[0, inf)")
    punctuation_tags: list[str] = option(
        PUNCTUATION_TAGS, "words whose fourth column is one of these are punctuation for the scores"
    )
    batch_size: int = option(1024, "transitions a micro-batch on each process", within="(0, inf)")
    eval_batch_size: int = option(256, "sentences or transitions a batch in evaluation", within="(0, inf)")
