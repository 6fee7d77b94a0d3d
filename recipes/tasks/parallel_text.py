"""Sentence pairs from the Hub or from local files, and the usual cleaning of IWSLT14.

A local file is a table with a column for each language (.json, .jsonl, .csv, .tsv, .parquet), or plain text with one
sentence per line. The name of a text file contains `{lang}`, which stands for either language (`train.{lang}.gz`). It
may be a pattern; matching files are read in the order of their names. The XML and `train.tags` files of IWSLT are read
directly.
"""

from __future__ import annotations

import glob
import gzip
import html
import re
import zlib
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from datasets import Dataset

from tasks.bleu import moses_tokenize
from tasks.data import SPLITS, DataError, check_text_column, limited, read_splits, split_files
from tasks.options import ParallelOptions

# The columns that the recipe works with: `reference` is the target as it came, `target` as it was prepared.
SOURCE, TARGET, REFERENCE = "source", "target", "reference"


def load_pairs(options: ParallelOptions) -> dict[str, Dataset]:
    """Return the splits train, validation and, if there is one, test, with `source`, `target` and `reference`.

    Raises DataError for files that are missing or do not match, for missing columns and for empty splits.
    """
    if options.source_lang == options.target_lang:
        raise DataError(f"--source_lang and --target_lang are both {options.source_lang!r}")
    files = {split: getattr(options, f"{split}_file") for split in SPLITS}
    held_out = options.hold_out_every is not None
    if held_out and files["validation"] is not None:
        raise DataError(
            f"--validation_file {files['validation']}: --hold_out_every {options.hold_out_every} takes the validation "
            "pairs from the training data; leave one of them out"
        )
    if any(file is not None and "{lang}" in file for file in files.values()):
        splits = {}
        for split, file in files.items():
            if file is None:
                if split == "train" or (split == "validation" and not held_out):
                    raise DataError(f"--{split}_file is missing: local files were given, but none to {split}")
                continue
            splits[split] = _read_text_pair(file, split, options)
    else:
        train = {"validation_file": files["train"], "validation_split": options.train_split}
        splits = read_splits(replace(options, **train) if held_out else options)  # that of validation is made below
        splits = {split: _columns(data, split, options) for split, data in splits.items()}
    splits = {split: _prepare(data, options) for split, data in splits.items()}
    if options.max_length_ratio is not None or options.max_words is not None:
        splits["train"] = splits["train"].select(_clean(splits["train"], options))
    if held_out:
        numbers = range(1, len(splits["train"]) + 1)
        last = [number - 1 for number in numbers if number % options.hold_out_every == 0]
        rest = [number - 1 for number in numbers if number % options.hold_out_every != 0]
        splits |= {"train": splits["train"].select(rest), "validation": splits["train"].select(last)}
    return limited(splits, options)


def _columns(data: Dataset, split: str, options: ParallelOptions) -> Dataset:
    column = options.translation_column
    if column is not None:
        if column not in data.column_names:
            raise DataError(
                f"--translation_column {column!r}: the {split} split has only "
                f"{', '.join(map(repr, data.column_names))}"
            )
        data = data.flatten()
        langs = {f"{column}.{lang}": lang for lang in (options.source_lang, options.target_lang)}
        data = data.rename_columns({name: lang for name, lang in langs.items() if name in data.column_names})
    for name in ("source_lang", "target_lang"):
        check_text_column({split: data}, getattr(options, name), name, split_files(options))
    data = data.select_columns([options.source_lang, options.target_lang])
    return data.rename_columns({options.source_lang: SOURCE, options.target_lang: TARGET})


# --------------------------------------------------------------------------------------------------- text files


def _read_text_pair(pattern: str, split: str, options: ParallelOptions) -> Dataset:
    sides = []
    for lang in (options.source_lang, options.target_lang):
        paths = [Path(name) for name in sorted(glob.glob(pattern.replace("{lang}", lang)))]
        if not paths:
            raise DataError(f"--{split}_file {pattern}: no such file for {{lang}} = {lang}")
        try:
            sides.append([list(_sentences(path)) for path in paths])
        except (OSError, EOFError, ValueError, zlib.error) as error:
            raise DataError(f"--{split}_file {pattern}, {{lang}} = {lang}: cannot be read: {error}") from error
    source_files, target_files = sides
    sizes = ([len(part) for part in source_files], [len(part) for part in target_files])
    if sizes[0] != sizes[1]:
        raise DataError(
            f"--{split}_file {pattern}: the two languages are not aligned by line: {sizes[0]} lines in "
            f"{options.source_lang}, {sizes[1]} in {options.target_lang}"
        )
    source, target = ([line for part in files for line in part] for files in (source_files, target_files))
    if not source:
        raise DataError(f"the {split} split is empty ({pattern})")
    return Dataset.from_dict({SOURCE: source, TARGET: target})


def _sentences(path: Path) -> Iterator[str]:
    """Yield the sentences of a file, by its name: IWSLT's XML, IWSLT's `train.tags`, or one per line."""
    with gzip.open(path, "rb") if path.suffix == ".gz" else open(path, "rb") as file:
        # Only "\n" ends a line: U+2028 and others occur inside sentences and would shift the alignment. Windows
        # editors put a byte order mark before the text.
        lines = file.read().decode("utf-8-sig").split("\n")
    if lines and not lines[-1]:
        lines.pop()
    name = path.name.removesuffix(".gz")
    if name.endswith(".xml"):
        for line in lines:
            found = re.search(r"<seg[^>]*>(.*)</seg>", line)
            if found:
                yield html.unescape(found[1]).replace("\u2019", "'").strip()
    elif name.startswith("train.tags."):
        for line in lines:
            if not re.search(r"<(url|talkid|keywords|speaker|reviewer|translator)\b", line):
                yield re.sub(r"</?(title|description|doc|reviewer|translator)[^>]*>", "", line).strip()
    else:
        yield from (line.strip() for line in lines)


# --------------------------------------------------------------------------------------------------- preparation


def _prepare(data: Dataset, options: ParallelOptions) -> Dataset:
    data = data.add_column(REFERENCE, data[TARGET][:])
    if options.text_preparation == "none":
        return data

    def prepare(rows: dict[str, list[str]]) -> dict[str, list[str]]:
        return {
            SOURCE: moses_tokenize(rows[SOURCE], options.source_lang),
            TARGET: moses_tokenize(rows[TARGET], options.target_lang),
        }

    workers = options.preprocessing_workers
    return data.map(prepare, batched=True, num_proc=workers, desc="Tokenizing by Moses's rules")


def _clean(data: Dataset, options: ParallelOptions) -> list[int]:
    """Return the pairs that Moses's clean-corpus-n keeps: no side empty, too long, or much longer than the other."""
    longest, ratio = options.max_words or float("inf"), options.max_length_ratio or float("inf")
    kept = []
    for number, (source, target) in enumerate(zip(data[SOURCE], data[TARGET], strict=True)):
        a, b = len(source.split()), len(target.split())
        if min(a, b) >= 1 and max(a, b) <= longest and max(a, b) <= ratio * min(a, b):
            kept.append(number)
    return kept
