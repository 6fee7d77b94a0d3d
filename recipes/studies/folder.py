"""The output folder of a study: its finished runs are kept, so all of them must have had the same options."""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Collection
from pathlib import Path
from typing import Any

from common.checkpoints import lock_folder, write_json
from common.options import OptionError


def claim(folder: Path, args: argparse.Namespace, *, free: Collection[str]) -> None:
    """Make `folder`, or take up the one that a study with these options left.

    Raises OptionError naming every option, but those in `free`, that differs from the study that made the folder, and
    for a folder that another study is at work in.
    """
    folder.mkdir(parents=True, exist_ok=True)
    lock_folder(folder)
    options = json.loads(json.dumps(vars(args), default=str))
    path = folder / "options.json"
    if path.is_file():
        saved = json.loads(path.read_text(encoding="utf-8"))
        differing = [
            f"--{name} {saved.get(name)!r} then, {value!r} now"
            for name, value in options.items()
            if name not in free and saved.get(name) != value
        ]
        if differing:
            raise OptionError(
                f"{folder} holds runs with other options ({'; '.join(differing)}); give the same ones, or another "
                "--output_dir"
            )
        return
    write_json(path, options)


def read_json(path: Path) -> dict[str, Any]:
    """What `write_json` put there; a number that was not finite is NaN."""

    def with_nan(entry: dict[str, Any]) -> dict[str, Any]:
        return {
            key: [math.nan if v is None else v for v in value] if isinstance(value, list) else value
            for key, value in ((key, math.nan if value is None else value) for key, value in entry.items())
        }

    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"), object_hook=with_nan)
    return found
