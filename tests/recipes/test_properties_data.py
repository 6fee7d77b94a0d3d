"""Read generated data files: valid rows arrive unchanged, and an error names the broken file."""

from __future__ import annotations

import bz2
import csv
import gzip
import io
import itertools
import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tasks.bytes import ByteDataOptions, Segments, Windows, load_byte_splits
from tasks.data import DataError, check_text_column, load_file, resolve_labels

outcomes: Counter[str] = Counter()
few = settings(max_examples=90, derandomize=True, suppress_health_check=list(HealthCheck))
many = settings(max_examples=300, derandomize=True, suppress_health_check=list(HealthCheck))
counter = itertools.count()

texts = st.text(st.characters(codec="utf-8", exclude_characters="\x00\r\n\x85\u2028\u2029"), min_size=1, max_size=30)
texts |= st.sampled_from(
    ["👩\u200d👩\u200d👧 ok", "שלום עולם", "مرحبا", "tab\tin", 'a "quoted" text', "a, b", "word " * 100_000]
)
labels = st.lists(st.integers(0, 3), min_size=2, max_size=6).filter(lambda found: len(set(found)) > 1)
FORMATS = [".jsonl", ".json", ".csv", ".tsv", ".parquet", ".jsonl.gz"]


def write(folder: Path, suffix: str, rows: list[dict[str, Any]]) -> Path:
    path = folder / f"data{next(counter)}{suffix}"
    if suffix == ".parquet":
        import datasets

        datasets.Dataset.from_list(rows).to_parquet(path)
        return path
    if suffix == ".json":
        text = json.dumps(rows)
    elif suffix.startswith(".jsonl"):
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    else:
        buffer = io.StringIO(newline="")
        writer = csv.DictWriter(buffer, list(rows[0]), delimiter="\t" if suffix == ".tsv" else ",")
        writer.writeheader()
        writer.writerows(rows)
        text = buffer.getvalue()
    raw = text.encode()
    path.write_bytes(gzip.compress(raw) if suffix.endswith(".gz") else raw)
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("data")


@settings(few, max_examples=200)
@given(st.sampled_from(FORMATS), labels, st.data(), st.booleans())
def test_examples_arrive_unchanged(folder: Path, suffix: str, found: list[int], data: Any, named: bool) -> None:
    # A csv reader mistakes some texts for numbers or missing values; the recipes refuse them.
    classes: list[Any] = ["bad", "good", "ugly", "odd"] if named else list(range(4))
    rows = [{"text": "x" + data.draw(texts), "label": classes[number]} for number in found]
    loaded = load_file(write(folder, suffix, rows))
    assert loaded["text"][:] == [row["text"] for row in rows]
    check_text_column({"train": loaded}, "text", "text_column")
    names, numbers = resolve_labels({"train": loaded}, "label")
    assert [names[number] for number in numbers["train"]] == [str(row["label"]) for row in rows]
    outcomes["read"] += 1


@few
@given(
    st.sampled_from([".jsonl", ".json", ".csv", ".tsv", ".parquet", ".jsonl.gz", ".zip", ".idx"]),
    st.sampled_from(["empty", "binary", "nul", "latin-1", "utf-16", "ragged", "cut"]) | st.binary(max_size=50),
)
def test_broken_files_are_named_or_read_as_rows(folder: Path, suffix: str, what: str | bytes) -> None:
    lines = '{"text": "größer", "label": 0}\n{"text": "b", "label": 1}\n'
    broken = {
        "empty": b"",
        "binary": bytes(range(256)),
        "nul": b"\x00" * 100,
        "latin-1": lines.encode("latin-1"),
        "utf-16": lines.encode("utf-16"),
        "ragged": b'text,label\na,1\nb,2,3,4\n"c\n',
        "cut": lines[:-14].encode(),
    }
    path = folder / f"broken{next(counter)}{suffix}"
    path.write_bytes(broken[what] if isinstance(what, str) else what)
    try:
        loaded = load_file(path)
    except DataError as error:
        outcomes["refused"] += 1
        message = str(error)
    else:  # some bytes are a csv file of one column
        outcomes["read"] += 1
        message = path.name
        assert loaded.num_rows >= 0
    assert path.name in message
    assert "\n" not in message


sizes = st.just(0) | st.integers(0, 26)


@many
@given(st.binary(min_size=60, max_size=300), st.integers(2, 12), st.integers(0, 26), sizes, st.data())
def test_bytes_are_split_trained_on_and_scored_once(
    folder: Path, raw: bytes, length: int, validation: int, test: int, data: Any
) -> None:
    suffix, pack = data.draw(st.sampled_from([(".txt", bytes), (".gz", gzip.compress), (".bz2", bz2.compress)]))
    path = folder / f"bytes{suffix}"
    path.write_bytes(pack(raw))
    options = ByteDataOptions(
        train_file=str(path), validation_characters=validation, test_characters=test, sequence_length=length
    )
    parts = {"train": len(raw) - validation - test, "validation": validation, "test": test}
    if not validation or any(size <= length for name, size in parts.items() if size or name != "test"):
        with pytest.raises(DataError, match=r"bytes|no validation data"):
            load_byte_splits(options)
        outcomes["refused"] += 1
        return
    splits = load_byte_splits(options)
    order = [splits[name] for name in ("train", "validation", "test") if name in splits]
    assert np.concatenate(order).tobytes() == raw
    segments = Segments(splits["train"], length)
    assert all(len(segments[i]) == length + 1 for i in range(len(segments)))
    windows = Windows(splits["validation"], length, data.draw(st.integers(1, length)))
    assert sum(windows[i][1] for i in range(len(windows))) == validation - 1
    outcomes["read"] += 1


def test_enough_of_the_cases_were_valid() -> None:
    print(f"\ndata: {dict(outcomes)}")
    assert sum(outcomes.values()) >= 590
    assert outcomes["read"] >= 0.3 * sum(outcomes.values())
