"""Dependency trees in CoNLL-U and CoNLL-X files: reading, checking, writing, scoring.

One word a line in 8 to 10 columns divided by tabs (ID, FORM, LEMMA, UPOS, XPOS, FEATS, HEAD, DEPREL, DEPS, MISC), an
empty line after each sentence, comments before it. Lines of multi-word tokens (`3-4`) and of empty nodes (`8.1`) are
not words of the tree. They are skipped, and kept when the file is written again.
"""

from __future__ import annotations

import gzip
import zlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np

from tasks.data import DataError

HEAD, DEPREL, DEPS = 6, 7, 8
TAG_COLUMNS = {"upos": 3, "xpos": 4}


@dataclass
class Sentence:
    """Words with their tags and, in a treebank, their heads (0 for the root, else from 1) and relations."""

    forms: list[str] = field(default_factory=list)
    tags: list[str] = field(default_factory=list)
    coarse_tags: list[str] = field(default_factory=list)
    heads: list[int] = field(default_factory=list)
    relations: list[str] = field(default_factory=list)
    lines: list[str] = field(default_factory=list)  # as they came
    places: list[int] = field(default_factory=list)  # of the words among the lines
    numbers: list[int] = field(default_factory=list)  # of the words' lines in the file


def read_conllu(
    file: str | Path, *, tag_column: Literal["upos", "xpos"] = "xpos", trees: bool = True
) -> list[Sentence]:
    """Return the sentences of a file, plain or gzipped. Without `trees`, HEAD and DEPREL are ignored.

    Raises DataError naming file and line: wrong columns or ids, an invalid head, a cycle, no root.
    """
    path = Path(file)
    if not path.is_file():
        raise DataError(f"{file}: {'a folder, not a file' if path.is_dir() else 'no such file'}")
    try:
        data = path.read_bytes()
        if data[:2] == b"\x1f\x8b":
            data = gzip.decompress(data)
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{file}: cannot be read: {error}") from error
    sentences: list[Sentence] = []
    sentence = Sentence()
    number = 0
    for number, raw in enumerate([*data.removeprefix(b"\xef\xbb\xbf").split(b"\n"), b""], start=1):
        try:
            line = raw.decode("utf-8").rstrip("\r")
            if line.strip():
                sentence.lines.append(line)
                num_words = len(sentence.forms)
                _read_line(sentence, line, tag_column, trees)
                sentence.numbers += [number] * (len(sentence.forms) - num_words)
                continue
            if trees:
                _check_tree(sentence)
        except _LineError as error:
            at = number if error.word is None else sentence.numbers[error.word - 1]
            raise DataError(f"{file}, line {at}: {error}") from None
        except UnicodeDecodeError:
            raise DataError(f"{file}, line {number}: not UTF-8") from None
        if sentence.forms:
            sentences.append(sentence)
            sentence = Sentence()
        elif any(not kept.startswith("#") for kept in sentence.lines):
            raise DataError(f"{file}, line {number - 1}: a sentence without words")
    if not sentences:
        raise DataError(f"{file}: there is no sentence in it")
    return sentences


def check_forms(sentences: Sequence[Sentence], file: str | Path) -> None:
    """Raise DataError for a treebank without its words: some licenses permit sharing the trees only."""
    forms = [form for sentence in sentences for form in sentence.forms]
    if (blank := forms.count("_")) > len(forms) / 2:
        raise DataError(
            f"{file}: {blank:,} of {len(forms):,} words are '_': the text was removed from this treebank; restore it "
            "as its README describes"
        )


def check_tags(sentences: Iterable[Sentence], file: str | Path, tag_column: str) -> None:
    """Raise DataError for a file without tags."""
    if all(tag == "_" for sentence in sentences for tag in sentence.tags):
        [other] = TAG_COLUMNS.keys() - {tag_column}
        column = f"column {TAG_COLUMNS[tag_column] + 1} ({tag_column.upper()})"
        raise DataError(
            f"{file}: no word has a tag in {column}: give a file that has, or --tag_column {other} to train"
        )


class _LineError(ValueError):
    """An error in the line just read or, in a tree, in the line of `word`, counted from 1."""

    def __init__(self, message: str, word: int | None = None):
        super().__init__(message)
        self.word = word


def _read_line(sentence: Sentence, line: str, tag_column: str, trees: bool) -> None:
    if line.startswith("#"):
        if len(sentence.lines) > 1 and not sentence.lines[-2].startswith("#"):
            raise _LineError("a comment within a sentence")
        return
    columns = line.split("\t")
    if not 8 <= len(columns) <= 10:
        raise _LineError(f"expected 8 to 10 columns divided by tabs, got {len(columns)}")
    identifier, expected = columns[0], len(sentence.forms) + 1
    first, _, last = identifier.partition("-")
    if last:
        if not (_is_number(first) and _is_number(last) and int(first) == expected < int(last)):
            raise _LineError(f"the multi-word token {identifier!r} should begin at {expected} and end after it")
        return
    word, _, empty = identifier.partition(".")
    if empty:
        if not (_is_number(empty) and word == str(expected - 1)):
            raise _LineError(f"the empty node {identifier!r} should be of word {expected - 1}")
        return
    if identifier != str(expected):
        raise _LineError(f"expected the word {expected}, got {identifier!r}")
    if not columns[1]:
        raise _LineError("a word without a form")
    if trees:
        if not _is_number(columns[HEAD]):
            raise _LineError(f"the head must be a number, got {columns[HEAD]!r}")
        if not columns[DEPREL].strip("_"):
            raise _LineError("a word without a relation to its head")
        sentence.heads.append(int(columns[HEAD]))
        sentence.relations.append(columns[DEPREL])
    sentence.forms.append(columns[1])
    sentence.tags.append(columns[TAG_COLUMNS[tag_column]])
    sentence.coarse_tags.append(columns[TAG_COLUMNS["upos"]])
    sentence.places.append(len(sentence.lines) - 1)


def _is_number(text: str) -> bool:
    return text.isascii() and text.isdigit()


def _check_tree(sentence: Sentence) -> None:
    heads = [0, *sentence.heads]
    length = len(sentence.forms)
    for word, head in enumerate(heads[1:], start=1):
        if head > length or head == word:
            raise _LineError(f"the head of word {word} of {length} is {head}", word)
    if length and 0 not in heads[1:]:
        raise _LineError("no word of the sentence has the head 0", 1)
    reached = [True] + [False] * length
    for start in range(1, length + 1):
        path, word = [], start
        while not reached[word]:
            if word in path:
                raise _LineError(f"the heads from word {start} on go round in a circle", start)
            path.append(word)
            word = heads[word]
        for word in path:
            reached[word] = True


def write_conllu(
    sentences: Iterable[Sentence], heads: Iterable[Sequence[int]], relations: Iterable[Sequence[str]]
) -> str:
    """Return the sentences as they were read, with these heads and relations, and without graphs in DEPS."""
    lines: list[str] = []
    for sentence, its_heads, its_relations in zip(sentences, heads, relations, strict=True):
        written = list(sentence.lines)
        for place, head, relation in zip(sentence.places, its_heads, its_relations, strict=True):
            columns = written[place].split("\t")
            columns[HEAD : DEPREL + 1] = [str(head), relation]
            if len(columns) > DEPS:
                columns[DEPS] = "_"
            written[place] = "\t".join(columns)
        lines += [*written, ""]
    return "\n".join(lines) + "\n"


def attachments(
    gold: Sequence[Sentence],
    heads: Sequence[Sequence[int]],
    relations: Sequence[Sequence[str]],
    punctuation_tags: Sequence[str],
) -> np.ndarray:
    """Return counts, (sentences, 2, 3), of all words and of those that are not punctuation by their coarse tag.

    The counts are: words, correct heads, and correct heads with the correct relation.
    """
    counts = np.zeros((len(gold), 2, 3), dtype=np.int64)
    for row, sentence in enumerate(gold):
        right_head = np.asarray(sentence.heads) == np.asarray(heads[row])
        right = right_head & (np.asarray(sentence.relations) == np.asarray(relations[row]))
        counted = np.asarray([tag not in punctuation_tags for tag in sentence.coarse_tags])
        for kind, kept in enumerate((np.ones_like(counted), counted)):
            counts[row, kind] = kept.sum(), right_head[kept].sum(), right[kept].sum()
    return counts


def attachment_scores(counts: np.ndarray) -> dict[str, float]:
    """Return unlabeled and labeled attachment scores, in percent, of the summed `attachments` (2, 3)."""
    scores = {}
    for kind, (words, right_head, right) in zip(("with", "without"), counts.tolist(), strict=True):
        scores[f"uas_{kind}_punctuation"] = 100 * right_head / max(words, 1)
        scores[f"las_{kind}_punctuation"] = 100 * right / max(words, 1)
    return scores
