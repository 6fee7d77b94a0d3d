"""Data sets from the Hub or from local files, checked before anything is trained."""

from __future__ import annotations

import csv
import difflib
import glob
import gzip
import hashlib
import itertools
import re
import sys
import warnings
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import datasets
import numpy as np
from datasets import ClassLabel, Dataset, Value

from common.endings import DataError
from hf_adanorm.norms import did_you_mean
from tasks.idx_images import is_idx, labels_beside, load_idx_images
from tasks.options import DataOptions

FORMATS = {".json": "json", ".jsonl": "json", ".csv": "csv", ".tsv": "csv", ".parquet": "parquet"}
USE = {"train": "train on", "validation": "choose the best checkpoint on", "test": "test on"}
SPLITS = tuple(USE)
DATA_OPTIONS = ("train_file", "validation_file", "test_file", "dataset_name")
# The options that name text columns: their cells in a CSV are text even if they look like numbers.
TEXT_COLUMNS = ("text_column", "text_pair_column", "label_column", "source_lang", "target_lang")
# With more classes than this, and as many as half of the examples, the column is an identifier.
MANY_CLASSES = 1000


def load_splits(options: DataOptions) -> dict[str, Dataset]:
    """Return the splits: train, validation and, if it is to be scored, test, up to `max_*_samples` of each.

    Raises DataError for a file or data set that cannot be read, a missing or empty split, and `split_sizes` that the
    data cannot fill.
    """
    return limited(read_splits(options), options)


def limited(splits: dict[str, Dataset], options: DataOptions) -> dict[str, Dataset]:
    """Return the first `max_*_samples` of every split. Raises DataError for an empty one."""
    found = {}
    for split, data in splits.items():
        file, limit = getattr(options, f"{split}_file"), getattr(options, f"max_{split}_samples")
        if len(data) == 0:
            raise DataError(f"the {split} split is empty" + (f" ({file})" if file else ""))
        found[split] = data.select(range(min(limit or len(data), len(data))))
    return found


def read_splits(options: DataOptions) -> dict[str, Dataset]:
    """Return complete splits; see `load_splits`."""
    files, sizes = split_files(options), getattr(options, "split_sizes", None)
    if files:
        for split in ("train",) if sizes else ("train", "validation"):
            if split not in files:
                raise DataError(f"--{split}_file is missing: local files were given, but none to {USE[split]}")
        texts = [getattr(options, name, None) for name in TEXT_COLUMNS]
        splits = {split: load_file(file, split, texts) for split, file in files.items()}
    elif options.dataset_name is not None:
        splits = _load_hub(options)
    else:
        raise DataError("no data: give --train_file and --validation_file, or --dataset_name")
    if sizes:
        splits = divide(splits, sizes)
    if not getattr(options, "score_test", True):
        splits.pop("test", None)
    return splits


def divide(splits: dict[str, Dataset], sizes: Sequence[int]) -> dict[str, Dataset]:
    """Divide all examples at random into `sizes` for train, validation and test, always in the same way.

    Two sizes divide train and validation only, and the test split is unchanged. Raises DataError for another number of
    sizes, sizes below 1 or beyond the number of examples, and splits with different columns.
    """
    pooled = [data for split, data in splits.items() if split != "test" or len(sizes) == 3]
    total = sum(map(len, pooled))
    if len(sizes) not in (2, 3) or min(sizes) < 1 or sum(sizes) > total:
        raise DataError(f"--split_sizes {list(sizes)}: expected 2 or 3 positive sizes of {total:,} examples in all")
    try:
        pool = datasets.concatenate_datasets(pooled)
    except ValueError as error:
        raise DataError(f"--split_sizes: the splits cannot be put together: {error}") from error
    order = np.random.default_rng(0).permutation(total)
    cuts = np.cumsum([0, *sizes]).tolist()
    parts = [order[start:end] for start, end in itertools.pairwise(cuts)]
    return splits | {split: pool.select(part).flatten_indices() for split, part in zip(SPLITS, parts, strict=False)}


def content_of(paths: Sequence[Path]) -> str:
    """Return a hash of the contents of files, and of all files in folders."""
    key = hashlib.sha256()
    for path in paths:
        for file in [path] if path.is_file() else sorted(path.rglob("*")):
            if file.is_file():
                with open(file, "rb") as opened:
                    key.update(hashlib.file_digest(opened, "sha256").digest())
    return key.hexdigest()


def data_content(options: Any) -> dict[str, str]:
    """Return a hash of a run's local data by option.

    For images it covers the files that the table names. Missing files and data sets of the Hub are left out.
    """
    content = {}
    for name in DATA_OPTIONS:
        value = getattr(options, name, None)
        if value is None or (name == "dataset_name" and options.train_file is not None):
            continue
        langs = [getattr(options, "source_lang", ""), getattr(options, "target_lang", "")]
        names = [value.replace("{lang}", lang) for lang in dict.fromkeys(langs)] if "{lang}" in value else [value]
        paths = [Path(found) for name in names for found in sorted(glob.glob(name)) or [name]]
        if getattr(options, "task", None) == "image" and paths[0].is_file():
            paths += image_files(paths[0], options.image_column)
        if all(path.exists() for path in paths):
            content[name] = content_of(paths)
    return content


def image_files(path: Path, column: str) -> list[Path]:
    """Return the files that belong to a table of images: IDX's labels, or the images that a column names."""
    if is_idx(path):
        return [labels_beside(path)]
    data = load_file(path)
    values = data[column] if is_text(data.features.get(column)) else []
    return [path.resolve().parent / value for value in values if value is not None]


def load_file(
    file: str | Path, split: str = "train", text_columns: Sequence[str | None] = (), option_name: str | None = None
) -> Dataset:
    """Load one local file, by its ending.

    In a CSV, cells of `text_columns` are text even if they look like numbers, and only an empty cell is missing.
    Raises DataError naming the file and its option, by default that of the split.
    """
    path, option_name = Path(file), option_name or f"{split}_file"
    if path.is_dir():
        raise DataError(f"--{option_name} {file}: a folder, not a file")
    if not path.is_file():
        known = [other.name for other in path.parent.iterdir()] if path.parent.is_dir() else []
        close = difflib.get_close_matches(path.name, known, n=1)
        raise DataError(f"--{option_name} {file}: no such file" + (f"; did you mean {close[0]}?" if close else ""))
    if is_idx(path):
        try:
            return load_idx_images(path)
        except (ValueError, OSError, EOFError, zlib.error) as error:
            raise DataError(f"{file}: cannot be read as IDX: {error}") from error
    suffix = Path(path.name.lower().removesuffix(".gz")).suffix
    if suffix not in FORMATS:
        raise DataError(f"{file}: cannot tell its format from {suffix!r}; known are {', '.join(FORMATS)}")
    if path.stat().st_size == 0:
        raise DataError(f"the {split} split is empty ({file})")
    extra: dict[str, Any] = {}
    if FORMATS[suffix] == "csv":
        separator = "\t" if suffix == ".tsv" else ","
        _check_cells(path, separator, option_name)
        extra = {
            "sep": separator,
            "index_col": False,  # else cells beyond the header would shift the columns
            "keep_default_na": False,
            "na_values": [""],  # before pandas 3.1, not for columns with a converter
            "converters": {name: lambda cell: cell or None for name in text_columns if name},
        }
    try:
        data = datasets.load_dataset(
            FORMATS[suffix], data_files=str(path.resolve()), split="train", cache_dir=_cache(path), **extra
        )
        data.data.validate(full=True)  # JSON lines may contain bytes that are not UTF-8
    except Exception as error:  # datasets wraps the parsers' errors, differently by version
        cause = error.__cause__ or error
        first_line = (str(cause).strip() or type(cause).__name__).splitlines()[0]
        if "corresponds to no data" in first_line:
            raise DataError(f"the {split} split is empty ({file})") from error
        raise DataError(f"{file}: cannot be read as {FORMATS[suffix]}: {first_line}") from error
    if suffix == ".tsv":
        _check_quotes(file, data)
    return data


def _cache(path: Path) -> str:
    """Return the folder where `datasets` caches a path by its content: its own cache goes by the time of change."""
    return str(Path(datasets.config.HF_DATASETS_CACHE) / f"adanorm-{content_of([path])[:32]}")


def _check_cells(path: Path, delimiter: str, option_name: str) -> None:
    """Raise DataError where a row has cells beyond the header. Empty ones, after a trailing delimiter, are ignored."""
    csv.field_size_limit(sys.maxsize)
    try:
        with (gzip.open if path.suffix.lower() == ".gz" else open)(
            path, "rt", encoding="utf-8-sig", errors="replace", newline=""
        ) as file:
            rows = csv.reader(file, delimiter=delimiter)
            width = len(next(rows, []))
            for row, cells in enumerate(rows, start=1):
                if any(cells[width:]):
                    raise DataError(
                        f"--{option_name} {path}, row {row} (line {rows.line_num}): {len(cells)} cells, but the "
                        f"header has {width}; put quotes around a cell that contains {delimiter!r}"
                    )
    except (csv.Error, OSError, EOFError, zlib.error):
        return  # pandas reports it


def _check_quotes(file: str | Path, data: Dataset) -> None:
    """Raise DataError if a quotation mark at the start of a cell has swallowed rows up to the next mark."""
    for column in data.column_names:
        for row, cell in enumerate(data.data.column(column).to_pylist(), start=1):
            if isinstance(cell, str) and "\t" in cell and "\n" in cell:
                raise DataError(
                    f"{file}, row {row}, column {column!r}: the quotation mark before {cell[:20]!r} takes in the rows "
                    'after it; double such marks and put the cell in quotes (""" at its start), or use .jsonl'
                )


def _load_hub(options: DataOptions) -> dict[str, Dataset]:
    names = {"train": options.train_split, "validation": options.validation_split, "test": options.test_split}
    parts = {name for name in names.values() if name is not None and "[" in name}  # such as train[:-5000]
    local = Path(options.dataset_name)
    cache = {"cache_dir": _cache(local)} if local.exists() else {}
    try:
        found = datasets.load_dataset(options.dataset_name, options.dataset_config, **cache)
        for part in parts:
            found[part] = datasets.load_dataset(options.dataset_name, options.dataset_config, split=part, **cache)
    except Exception as error:
        first_line = (str(error).strip() or type(error).__name__).splitlines()[0]
        hint = "without a network give --train_file, --validation_file and --test_file"
        raise DataError(f"--dataset_name {options.dataset_name}: cannot be loaded: {first_line}; {hint}") from error
    if options.validation_split is None and getattr(options, "split_sizes", None) is None:
        raise DataError("--validation_split is missing: name one, or divide the data with --split_sizes")
    for split, name in names.items():
        if name is not None and name not in found:
            raise DataError(
                f"--{split}_split {name!r}: {options.dataset_name} has the splits {', '.join(map(repr, found))}"
            )
    return {split: found[name] for split, name in names.items() if name is not None}


def is_text(feature: Any) -> bool:
    """Return whether a column contains text, which is a `large_string` in a CSV from pandas 3 on."""
    return isinstance(feature, Value) and feature.dtype in {"string", "large_string"}


def split_files(options: Any) -> dict[str, str]:
    """Return the local file of each split, for errors."""
    files = {split: getattr(options, f"{split}_file", None) for split in SPLITS}
    return {split: file for split, file in files.items() if file is not None}


def check_text_column(
    splits: dict[str, Dataset], column: str, option_name: str, files: Mapping[str, str] | None = None
) -> None:
    """Raise DataError unless every split has `column` with a string in every row."""
    for split, data in splits.items():
        check_column(data, split, column, option_name)
        feature, place = data.features[column], _place(split, files)
        values = data.data.column(column)
        if not is_text(feature) or values.null_count:
            found = [(row, value) for row, value in enumerate(values.to_pylist(), start=1) if type(value) is not str]
            if not found:  # values of several types
                raise DataError(f"{place}, column {column!r}: expected text in every row, got {feature}")
            if missing := [row for row, value in found if value is None]:
                raise DataError(f"{place}, column {column!r}: no text in {_rows(missing)}")
            raise DataError(f"{place}, column {column!r}, row {found[0][0]}: expected text, got {found[0][1]!r}")


def check_column(data: Dataset, split: str, column: str, option_name: str) -> None:
    """Raise DataError, with the closest name if there is one, unless the split has `column`."""
    if column not in data.column_names:
        raise DataError(
            f"--{option_name} {column!r}: the {split} split has no such column, only "
            f"{', '.join(map(repr, data.column_names))}{did_you_mean(column, data.column_names)}"
        )


def _place(split: str, files: Mapping[str, str] | None) -> str:
    return (files or {}).get(split, f"{split} split")


def _rows(rows: Sequence[int], most: int = 10) -> str:
    """Return rows, counted from 1, for an error: "row 3", "rows 3, 5, 8", "rows 3, ... and 25 more"."""
    more = f" and {len(rows) - most:,} more" if len(rows) > most else ""
    return f"row{'s' * (len(rows) > 1)} {', '.join(map(str, rows[:most]))}{more}"


def resolve_labels(
    splits: dict[str, Dataset],
    column: str,
    label_names: Sequence[str] | None = None,
    files: Mapping[str, str] | None = None,
) -> tuple[list[str], dict[str, list[int]]]:
    """Return the names of the classes, and the labels of each split as integers from 0.

    The rule, the same for CSV, JSON and Parquet:

    1. A label is a name: the text in the file, unchanged (`1`, `01` and `True` in a CSV are three names). A whole
       number or a boolean of a JSON or Parquet file counts as its JSON text (`1`, `true`); other values are refused.
    2. The classes are `label_names`, in this order. Otherwise they are those that the data set declares, or else the
       names in the training split, in numeric order if all are whole numbers, else in alphabetical order.
    3. If `label_names` contains none of the training labels and these are whole numbers from 0, number n is the n-th
       name, counted from 0.

    Raises DataError for a missing column or label, an unknown label, fewer than two classes, and classes that differ
    in spaces only. Warns about spaces around a label.
    """
    given: dict[str, list[str]] = {}
    feature = splits["train"].features.get(column)
    for split, data in splits.items():
        check_column(data, split, column, "label_column")
        place = f"{_place(split, files)}, column {column!r}"
        values = data.data.column(column).to_pylist()
        if missing := [row for row, value in enumerate(values, start=1) if value is None]:
            raise DataError(f"{place}: no label in {_rows(missing)}")
        given[split] = [_label_text(value, f"{place}, row {row}") for row, value in enumerate(values, start=1)]
    found, declared = set(given["train"]), feature.names if isinstance(feature, ClassLabel) else None
    numbered = declared is not None  # such a data set contains numbers
    if label_names is not None:
        names = [str(name) for name in label_names]
        if len(set(names)) != len(names):
            raise DataError(f"--label_names contains a name twice: {names}")
        if declared is not None and set(declared) == set(names):
            given = {split: [declared[int(label)] for label in labels] for split, labels in given.items()}
            numbered = False
        elif declared is None:
            numbered = not found & set(names) and all(_is_number(label) for label in found)
    elif declared is not None:
        names = list(declared)
    else:
        names = sorted(found, key=int) if all(map(_is_number, found)) else sorted(found)
        _check_spaces(names, column)
        if len(names) > max(MANY_CLASSES, len(given["train"]) // 2):
            raise DataError(
                f"--label_column {column}: {len(names):,} different labels in {len(given['train']):,} training "
                "examples look like an identifier; if they are the classes, give them by --label_names"
            )
    if len(names) < 2:
        raise DataError(f"the training split has a single class, {names}: there is nothing to learn")
    numbers = {str(number) if numbered else name: number for number, name in enumerate(names)}
    for split, labels in given.items():
        unknown = [row for row, label in enumerate(labels, start=1) if label not in numbers]
        if unknown:
            label = labels[unknown[0] - 1]
            alike = [name for name in numbers if name.strip() == label.strip()]
            hint = f"; it differs from {alike[0]!r} in spaces only" if alike else ""
            kind = (
                f"a number from 0 to {len(names) - 1}" if numbered else f"one of the {len(names)} classes {names[:20]}"
            )
            raise DataError(
                f"{_place(split, files)}, column {column!r}, {_rows(unknown)}: the label {label!r} is not {kind}{hint}"
            )
    return names, {split: [numbers[label] for label in labels] for split, labels in given.items()}


def _label_text(value: Any, place: str) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, (str, int)):
        return str(value)
    raise DataError(f"{place}: expected a label as text or a whole number, got {value!r}")


def _is_number(label: str) -> bool:
    """Return whether a label is a whole number without leading zeros."""
    return re.fullmatch(r"-?(0|[1-9]\d*)", label) is not None


def _check_spaces(names: Sequence[str], column: str) -> None:
    plain = [name.strip() for name in names]
    for name, stripped in zip(names, plain, strict=True):
        if plain.count(stripped) > 1:
            alike = [other for other in names if other.strip() == stripped]
            raise DataError(
                f"train split, column {column!r}: the labels {' and '.join(map(repr, alike))} differ in spaces only; "
                "remove the spaces, or give the classes by --label_names"
            )
        if name != stripped:
            warnings.warn(f"column {column!r}: the label {name!r} has spaces around it", stacklevel=3)
