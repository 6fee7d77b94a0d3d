"""Sentence pairs from files, the cleaning of IWSLT14, scores, and the joint tokenizer."""

import gzip
import json

import pytest

from tasks.data import DataError
from tasks.parallel_text import ParallelOptions, load_pairs


def write(path, lines):
    opener = gzip.open if path.suffix == ".gz" else open
    with opener(path, "wt", encoding="utf-8", newline="\n") as file:
        file.write("".join(line + "\n" for line in lines))


@pytest.fixture
def folder(tmp_path):
    """Return a folder of plain text in two languages. One sentence contains U+2028 and a vertical tab."""
    for split, size in {"train": 30, "val": 5, "test": 4}.items():
        write(tmp_path / f"{split}.de.gz", [f"Satz\u2028 {split}\x0b {n}" for n in range(size)])
        write(tmp_path / f"{split}.en.gz", [f"sentence {split} {n}" for n in range(size)])
    return tmp_path


def options_for(folder, **changes):
    names = {"train": "train", "validation": "val", "test": "test"}
    files = {f"{split}_file": f"{folder}/{name}.{{lang}}.gz" for split, name in names.items()}
    return ParallelOptions(**{**files, **changes})


def test_a_validation_file_beside_pairs_held_out_is_refused(folder):
    with pytest.raises(DataError, match=r"--validation_file .*val\.\{lang\}\.gz: --hold_out_every 3 takes"):
        load_pairs(options_for(folder, hold_out_every=3))


def test_plain_text_is_aligned_by_line_feeds_alone(folder):
    splits = load_pairs(options_for(folder))
    assert {split: len(data) for split, data in splits.items()} == {"train": 30, "validation": 5, "test": 4}
    assert splits["train"][7] == {
        "source": "Satz\u2028 train\x0b 7",
        "target": "sentence train 7",
        "reference": "sentence train 7",
    }


def test_marks_and_line_ends_of_windows_are_no_part_of_the_sentences(folder):
    for lang, words in {"de": "eins\xa0a\r\nzwei", "en": "one\r\ntwo"}.items():
        (folder / f"val.{lang}.gz").write_bytes(gzip.compress(words.encode("utf-8-sig")))
    rows = load_pairs(options_for(folder))["validation"].to_list()
    assert [list(row.values()) for row in rows] == [["eins\xa0a", "one", "one"], ["zwei", "two", "two"]]


def test_languages_of_different_numbers_of_lines_are_refused(folder):
    write(folder / "val.en.gz", ["one too few"] * 4)
    with pytest.raises(DataError, match=r"not aligned by line: \[5\] lines in de, \[4\] in en"):
        load_pairs(options_for(folder))
    with pytest.raises(DataError, match=r"no such file for \{lang\} = fr"):
        load_pairs(options_for(folder, target_lang="fr"))


def test_limits_count_after_the_cleaning(folder):
    splits = load_pairs(options_for(folder, max_train_samples=4, hold_out_every=3, validation_file=None))
    assert splits["train"]["target"][:] == [f"sentence train {n}" for n in (0, 1, 3, 4)]
    assert splits["validation"]["target"][:] == [f"sentence train {n}" for n in range(2, 30, 3)]


@pytest.mark.parametrize("nested", [True, False])
def test_tables_hold_both_languages_in_columns_or_in_one(tmp_path, nested):
    rows = [{"de": f"Wort {n}", "en": f"word {n}"} for n in range(6)]
    write(tmp_path / "a.jsonl", [json.dumps({"translation": row} if nested else {**row, "id": 1}) for row in rows])
    file = str(tmp_path / "a.jsonl")
    column = "translation" if nested else None
    splits = load_pairs(ParallelOptions(train_file=file, validation_file=file, translation_column=column))
    assert splits["train"]["source"][:] == [row["de"] for row in rows]
    assert splits["validation"]["target"][:] == [row["en"] for row in rows]
    splits = load_pairs(ParallelOptions(train_file=file, translation_column=column, hold_out_every=3))
    assert splits["train"]["source"][:] == [f"Wort {n}" for n in (0, 1, 3, 4)]
    assert splits["validation"]["source"][:] == ["Wort 2", "Wort 5"]


def test_a_missing_column_names_those_there_are(tmp_path):
    write(tmp_path / "a.jsonl", [json.dumps({"de": "a", "en": "b"})])
    file = str(tmp_path / "a.jsonl")
    with pytest.raises(DataError, match="--target_lang 'fr': the train split has no such column, only 'de', 'en'"):
        load_pairs(ParallelOptions(train_file=file, validation_file=file, target_lang="fr"))


def test_the_usual_preparation_of_iwslt14(tmp_path):
    """Tags dropped, Moses's tokens, the ratio 1.5, every third of the rest held out, the test sets joined in order."""
    english = [f"It's talk {n}, isn't it?" for n in range(12)]
    for lang, lines in {"de": [f"Das ist Rede {n}, nicht wahr?" for n in range(12)], "en": list(english)}.items():
        lines[5] = "zu kurz" if lang == "de" else "much too long " * 9
        body = ["<url>http://x</url>", "<title>A title here.</title>", "<talkid>1</talkid>", *lines]
        write(tmp_path / f"train.tags.de-en.{lang}", body)
        for name in ("tst2010", "dev2010"):
            segments = [f'<seg id="{n}"> {name} {lang} {n} &amp; more </seg>' for n in (1, 2)]
            write(tmp_path / f"IWSLT14.TED.{name}.de-en.{lang}.xml", ["<doc>", *segments, "</doc>"])
    files = {"train": "train.tags.de-en.{lang}", "test": "IWSLT14.TED*.de-en.{lang}.xml"}
    options = {f"{split}_file": f"{tmp_path}/{name}" for split, name in files.items()}
    options |= {"text_preparation": "moses", "hold_out_every": 3, "max_length_ratio": 1.5, "max_words": 175}
    splits = load_pairs(ParallelOptions(**options))
    kept = ["A title here.", *english[:5], *english[6:]]
    assert splits["train"]["reference"][:] == [text for n, text in enumerate(kept) if n % 3 != 2]
    assert splits["validation"]["reference"][:] == kept[2::3]
    assert splits["train"]["target"][1] == "It 's talk 0 , isn 't it ?"
    names = ("dev2010", "tst2010")
    assert splits["test"]["reference"][:] == [f"{name} en {n} & more" for name in names for n in (1, 2)]


@pytest.mark.parametrize(
    ("suffix", "raw"), [("gz", b"no gzip"), ("gz", b"\x1f\x8b\x08"), ("txt", "größer".encode("latin-1"))]
)
def test_a_text_file_that_cannot_be_read_is_named(tmp_path, suffix, raw):
    for lang in ("de", "en"):
        (tmp_path / f"train.{lang}.{suffix}").write_bytes(raw)
    pattern = str(tmp_path / f"train.{{lang}}.{suffix}")
    with pytest.raises(DataError, match=r"--train_file .*train\.\{lang\}.*\{lang\} = de: cannot be read"):
        load_pairs(ParallelOptions(train_file=pattern, validation_file=pattern))
