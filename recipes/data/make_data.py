"""Make the embedded data sets from the Debian packages of the LibreOffice help (see README.md beside this file).

    python recipes/data/make_data.py                       fetches the packages with `apt-get download`
    python recipes/data/make_data.py FOLDER                uses the .deb files in FOLDER

Needs `dpkg-deb`. The same packages give the same files, byte for byte.
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import io
import json
import re
import subprocess
import tempfile
from collections.abc import Iterable, Iterator
from html.parser import HTMLParser
from pathlib import Path

LANGUAGES = {"en": "en-us", "de": "de", "vi": "vi"}  # ours: Debian's
MIN_WORDS, MAX_WORDS = 4, 40
LENGTH_RATIO = (0.4, 2.5)
MAX_PAIRS = {"de": 10000, "vi": 5000}
MAX_PER_CLASS = 1100
# The help is one folder a program; `shared` and `schart` describe what several programs have.
Texts = dict[tuple[str, str], str]  # (page, paragraph id) -> text
PROGRAMS = {
    "sbasic": "basic",
    "scalc": "calc",
    "sdatabase": "base",
    "sdraw": "draw",
    "simpress": "impress",
    "smath": "math",
    "swriter": "writer",
}
# A sentence that names a program gives its class away.
PROGRAM_NAME = re.compile(r"\b(Writer|Calc|Impress|Draw|Math|Base|Basic|BASIC|VBA)\b")
HELD_OUT = {"validation": 0.08, "test": 0.08}


class Paragraphs(HTMLParser):
    """Collects the text of every `<p>` and `<h1>`..`<h6>` that has a paragraph id."""

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.found: dict[str, str] = {}
        self.id: str | None = None
        self.tag = ""
        self.text: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if self.id is None and re.fullmatch(r"p|h[1-6]", tag):
            attributes = dict(attrs)
            name = attributes.get("id") or ""
            is_code = "code" in (attributes.get("class") or "")
            if re.match(r"par_id|hd_id", name) and not is_code:
                self.id, self.tag, self.text = name, tag, []
        elif tag == "br":
            self.text.append(" ")

    def handle_endtag(self, tag: str) -> None:
        if self.id is not None and tag == self.tag:
            text = " ".join("".join(self.text).split())
            text = re.sub(r" ([.,;:)])", r"\1", text)  # an icon stood there
            self.found.setdefault(self.id, text)
            self.id = None

    def handle_data(self, data: str) -> None:
        if self.id is not None:
            self.text.append(data)


def read_help(root: Path) -> Texts:
    """All paragraphs of one language: (page, paragraph id) -> text, in a fixed order."""
    pages = sorted(root.glob("usr/share/libreoffice/help/*/text"))
    if not pages:
        raise FileNotFoundError(f"{root}: no help pages in this package")
    paragraphs = {}
    for path in sorted(pages[0].rglob("*.html")):
        parser = Paragraphs()
        parser.feed(path.read_text(encoding="utf-8"))
        page = path.relative_to(pages[0]).as_posix()
        paragraphs.update({(page, name): text for name, text in parser.found.items()})
    return paragraphs


def is_sentence(text: str) -> bool:
    return MIN_WORDS <= len(text.split()) <= MAX_WORDS and re.search(r"[^\W\d_]{2}", text) is not None


def comparison_key(text: str) -> str:
    """What two sentences must not share to count as different: letters and digits, whatever their case."""
    return re.sub(r"[\W_]+", "", text.casefold())


def sampling_key(*parts: str) -> bytes:
    """A pseudo-random sort key that depends on the text alone, not on a library's generator."""
    return hashlib.sha256("\0".join(parts).encode()).digest()


def sentence_pairs(source: Texts, target: Texts) -> Iterator[tuple[str, str]]:
    """Paragraphs that both languages have, each sentence once, whichever side it stands on."""
    seen: set[str] = set()
    for key, left in source.items():
        right = target.get(key)
        if right is None or not is_sentence(left) or not is_sentence(right):
            continue
        keys = {comparison_key(left), comparison_key(right)}
        ratio = len(right) / len(left)
        if len(keys) == 1 or keys & seen or not LENGTH_RATIO[0] <= ratio <= LENGTH_RATIO[1]:
            continue
        seen |= keys
        yield left, right


def program_sentences(english: Texts) -> Iterator[tuple[str, str]]:
    """(sentence, program) for every sentence that the help has for one program only and that names none."""
    folders: dict[str, set[str]] = {}
    first: dict[str, str] = {}
    for (page, _), text in english.items():
        key = comparison_key(text)
        folders.setdefault(key, set()).add(page.split("/")[0])
        first.setdefault(key, text)
    for key, found in folders.items():
        text, folder = first[key], min(found)
        if len(found) == 1 and folder in PROGRAMS and is_sentence(text) and not PROGRAM_NAME.search(text):
            yield text, PROGRAMS[folder]


def split(rows: Iterable[dict[str, str]]) -> dict[str, list[dict[str, str]]]:
    """Shuffle rows by their text and divide them."""
    ordered = sorted(rows, key=lambda row: sampling_key("split", *row.values()))
    counts = {name: round(share * len(ordered)) for name, share in HELD_OUT.items()}
    splits, start = {}, 0
    for name, count in counts.items():
        splits[name], start = ordered[start : start + count], start + count
    return {"train": ordered[start:], **splits}


def write(folder: Path, splits: dict[str, list[dict[str, str]]]) -> None:
    folder.mkdir(exist_ok=True)
    for name, rows in splits.items():
        buffer = io.BytesIO()
        with gzip.GzipFile(fileobj=buffer, mode="wb", compresslevel=9, mtime=0) as file:
            for row in rows:
                file.write((json.dumps(row, ensure_ascii=False) + "\n").encode())
        (folder / f"{name}.jsonl.gz").write_bytes(buffer.getvalue())
        print(f"{folder.name}/{name}.jsonl.gz: {len(rows)} rows, {len(buffer.getvalue()) / 1024:.0f} KiB")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", nargs="?", help="folder with the .deb files; by default they are fetched")
    parser.add_argument("--output", type=Path, default=Path(__file__).resolve().parent, help="where to write")
    arguments = parser.parse_args()
    packages = {ours: f"libreoffice-help-{debian}" for ours, debian in LANGUAGES.items()}
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(arguments.folder or scratch)
        if arguments.folder is None:
            subprocess.run(["apt-get", "download", *packages.values()], cwd=scratch, check=True)
        texts = {}
        for language, package in packages.items():
            debs = sorted(folder.glob(f"{package}_*.deb"))
            if not debs:
                raise FileNotFoundError(f"{folder}: no {package}_*.deb")
            root = Path(scratch) / language
            subprocess.run(["dpkg-deb", "-x", str(debs[-1]), str(root)], check=True)
            texts[language] = read_help(root)
    for language, limit in MAX_PAIRS.items():
        pairs = sorted(sentence_pairs(texts["en"], texts[language]), key=lambda pair: sampling_key(*pair))
        print(f"en-{language}: {len(pairs)} pairs found")
        write(
            arguments.output / f"en-{language}",
            split({"en": source, language: target} for source, target in pairs[:limit]),
        )
    rows: list[dict[str, str]] = []
    by_program: dict[str, list[str]] = {}
    for text, program in program_sentences(texts["en"]):
        by_program.setdefault(program, []).append(text)
    for program, sentences in sorted(by_program.items()):
        print(f"{program}: {len(sentences)} sentences found")
        kept = sorted(sentences, key=sampling_key)[:MAX_PER_CLASS]
        rows += [{"text": text, "label": program} for text in kept]
    write(arguments.output / "programs", split(rows))


if __name__ == "__main__":
    main()
