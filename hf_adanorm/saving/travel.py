"""Write the code that travels with a saved model: the loader, and the files of the author's norm classes.

A model of built-in norms brings `modeling_adanorm.py`, byte for byte the one of this package. A model with other
norms also brings their files, and an entry file: holder.py and the names of the norms. `auto_map` in config.json
points to the entry file. transformers finds the files by regular expressions, so what those miss is refused on saving.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from transformers.dynamic_module_utils import get_relative_imports

import hf_adanorm.holder
from hf_adanorm import modeling_adanorm
from hf_adanorm.norms import digest, files_of, find_classes
from hf_adanorm.spec import AdaNormSpec

from .files import leads_outside, write_file

LOADER, ENTRY = "modeling_adanorm.py", "modeling_adanorm_with_classes.py"


def _entry_text(homes: Mapping[str, tuple[str, str]]) -> str:
    """Return the entry file for the author's norms by name, given the file and the class of each: holder.py, then the
    norms."""
    imports = sorted({f"from .{file.removesuffix('.py')} import {cls}" for file, cls in homes.values()})
    named = ", ".join(f'"{name}": {cls}' for name, (_, cls) in sorted(homes.items()))
    lines = [
        Path(hf_adanorm.holder.__file__).read_text(encoding="utf-8"),
        "# Written by hf_adanorm: the norms of this model.",
        "from .modeling_adanorm import model_classes",
        *imports,
        "",
        f"__getattr__ = model_classes(__name__, held({{{named}}}))",
    ]
    return "\n".join(lines) + "\n"


def check_classes(entries: Mapping[str, Mapping[str, Any]]) -> dict[str, type]:
    """Return the classes of a spec. Raise ValueError for one that could not be loaded where hf_adanorm is missing."""
    for name, entry in entries.items():
        if not entry["files"]:
            where = f"{entry['class']} is defined in {entry['file']}, not in a file of its own"
            _refuse(name, f"{where}. Move it to a file such as my_norms.py and import it from there")
    classes = find_classes(entries)
    by_name: dict[str, Path] = {}
    for name, cls in classes.items():
        if "." in cls.__qualname__:
            _refuse(name, f"{cls.__qualname__} must be defined at the top level of its file")
        for path in files_of(cls):
            if not path.stem.isidentifier() or path.name in (LOADER, ENTRY, "__init__.py"):
                what = "has another use" if path.stem.isidentifier() else "is not a Python identifier"
                _refuse(name, f"rename {path.name}: this name {what}")
            other = by_name.setdefault(path.name, path)
            if digest(other) != digest(path):
                _refuse(name, f"two files of this model's norms are called {path.name}: {other} and {path}")
            check_file(name, path)
    return classes


def _refuse(name: str, why: str) -> NoReturn:
    raise ValueError(f"the norm {name!r} cannot be saved: {why}")


def check_file(name: str, path: Path) -> None:
    """Raise ValueError, naming the line, for a file of a norm that could not be loaded from a saved model's folder."""

    def refuse(line: int, why: str) -> NoReturn:
        _refuse(name, f"{path}, line {line}: {why}")

    text = path.read_text(encoding="utf-8")
    found: dict[str, int] = {}
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.ImportFrom) and node.level:
            if node.level > 1 or not node.module or "." in node.module:
                refuse(node.lineno, "write `from .name import ...`, with the file name.py in the same folder")
            if not path.with_name(f"{node.module}.py").is_file():
                refuse(node.lineno, f"there is no {node.module}.py in the same folder")
            found[node.module] = node.lineno
        elif isinstance(node, (ast.Import, ast.ImportFrom)):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else [str(node.module)]
            for top in (name.partition(".")[0] for name in names):
                if top == "hf_adanorm":
                    refuse(node.lineno, "it imports hf_adanorm, but the file must work where that is missing")
                if path.with_name(f"{top}.py").is_file():
                    refuse(node.lineno, f"it imports {top}, a file in the same folder: write `from .{top} import ...`")
                if (path.parent / top / "__init__.py").is_file():
                    refuse(node.lineno, f"it imports the folder {top}, which does not travel: move it into {top}.py")
    seen = get_relative_imports(path)  # those whose files transformers copies
    for module in seen:
        if module not in found:
            like_import = re.compile(rf"\s*(from|import)\s+\.{re.escape(module)}\b")
            lines = enumerate(text.splitlines(), 1)
            line = next((number for number, text_line in lines if like_import.match(text_line)), 1)
            refuse(line, "transformers takes this text for an import: reword it")
    for module, line in found.items():
        if module not in seen:
            refuse(line, "transformers does not see this import: write `from .name import` on one line of its own")


def own_file(reference: Any) -> str:
    """Return the file of hf_adanorm that an `auto_map` entry such as "modeling_adanorm.BertModel" points to, or ""."""
    module = reference.rpartition("--")[2].partition(".")[0] if isinstance(reference, str) else ""
    return module if f"{module}.py" in (LOADER, ENTRY) else ""


def write_code(folder: Path, classes: Mapping[str, type]) -> str:
    """Write the code of a model with these norms of the author's; return the module that `auto_map` points to."""
    write_file(folder / LOADER, Path(modeling_adanorm.__file__).read_bytes())
    files = {name: files_of(cls) for name, cls in classes.items()}
    for path in (path for paths in files.values() for path in paths):
        if (folder / path.name).resolve() != path.resolve():
            write_file(folder / path.name, path.read_bytes())
    if not classes:
        (folder / ENTRY).unlink(missing_ok=True)
        return Path(LOADER).stem
    homes = {name: (files[name][0].name, cls.__name__) for name, cls in classes.items()}
    write_file(folder / ENTRY, _entry_text(homes))
    return Path(ENTRY).stem


def remove_code(folder: Path) -> bool:
    """Remove our files from the folder of a model that is not patched any more, and return whether there were any."""
    title = Path(modeling_adanorm.__file__).read_bytes().partition(b"\n")[0]
    if not (folder / LOADER).is_file() or not (folder / LOADER).read_bytes().startswith(title):
        return False
    for name in (LOADER, ENTRY):
        (folder / name).unlink(missing_ok=True)
    return True


@dataclass(frozen=True)
class CodeReport:
    """The code in the folder of a model, see `inspect_code`."""

    loader: str
    """"ours" if modeling_adanorm.py is the one of this hf_adanorm, byte for byte; "modified" if not; "none"."""
    loader_sha256: str
    entry: str
    """The same for the entry file that joins the loader and the author's classes."""
    files: dict[str, str]
    """The author's own files and their SHA-256: what trust_remote_code=True executes besides the loader."""
    expected: dict[str, str]
    """The author's files that config.json names, and the SHA-256 that they had when the model was saved."""


def inspect_code(folder: Path, spec: AdaNormSpec | None = None) -> CodeReport:
    """Describe the code in the folder of a saved model, whose config.json has this spec, without executing it."""
    classes = {} if spec is None else spec.classes
    entry_text = _entry_text({name: (entry["file"], entry["class"]) for name, entry in classes.items()})

    def compare(path: Path, ours: bytes) -> str:
        return "none" if not path.is_file() else "ours" if path.read_bytes() == ours else "modified"

    return CodeReport(
        loader=compare(folder / LOADER, Path(modeling_adanorm.__file__).read_bytes()),
        loader_sha256=digest(folder / LOADER) if (folder / LOADER).is_file() else "",
        entry=compare(folder / ENTRY, entry_text.encode()),
        files={
            path.name: digest(path)
            for path in sorted(folder.glob("*.py"))
            if path.name not in (LOADER, ENTRY) and not leads_outside(path, folder)
        },
        expected={name: sha for entry in classes.values() for name, sha in entry["files"].items()},
    )
