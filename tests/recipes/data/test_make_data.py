"""The embedded data are what their README says."""

import gzip
import json
import re
from pathlib import Path

import pytest

DATA = Path(__file__).resolve().parents[3] / "recipes" / "data"
SPLITS = ("train", "validation", "test")


def rows(folder: str, split: str) -> list[dict[str, str]]:
    with gzip.open(DATA / folder / f"{split}.jsonl.gz", "rt", encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def key(text: str) -> str:
    return re.sub(r"[\W_]+", "", text.casefold())


def test_size_and_licence():
    assert sum(path.stat().st_size for path in DATA.rglob("*.gz")) < 1.3 * 2**20
    assert (DATA / "LICENSE").read_text(encoding="utf-8").startswith("Mozilla Public License Version 2.0")


@pytest.mark.parametrize(
    ("folder", "columns"), [("en-de", {"en", "de"}), ("en-vi", {"en", "vi"}), ("programs", {"text"})]
)
def test_no_sentence_occurs_twice_whatever_the_split_or_side(folder, columns):
    sentences = [key(row[column]) for split in SPLITS for row in rows(folder, split) for column in sorted(columns)]
    assert len(sentences) == len(set(sentences))


@pytest.mark.parametrize(("folder", "target"), [("en-de", "de"), ("en-vi", "vi")])
def test_pairs_are_sentences_of_comparable_length(folder, target):
    for split in SPLITS:
        for row in rows(folder, split):
            assert row.keys() == {"en", target}
            assert 4 <= len(row["en"].split()) <= 40
            assert 4 <= len(row[target].split()) <= 40
            assert 0.4 <= len(row[target]) / len(row["en"]) <= 2.5
            assert row["en"].casefold() != row[target].casefold()


def test_programs_are_the_seven_classes_in_every_split_and_unnamed_in_the_text():
    name = re.compile(r"\b(Writer|Calc|Impress|Draw|Math|Base|Basic|BASIC|VBA)\b")
    for split in SPLITS:
        found = rows("programs", split)
        assert {row["label"] for row in found} == {"base", "basic", "calc", "draw", "impress", "math", "writer"}
        assert not [row for row in found if name.search(row["text"])]


@pytest.mark.parametrize("folder", ["en-de", "en-vi", "programs"])
def test_the_readme_states_the_sizes(folder):
    sizes = " / ".join(f"{len(rows(folder, split)):,}" for split in SPLITS)
    line = next(
        line for line in (DATA / "README.md").read_text(encoding="utf-8").splitlines() if f"`{folder}`" in line
    )
    assert line.endswith(f"| {sizes} |")
