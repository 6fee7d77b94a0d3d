"""The output folder of a study: its finished runs are kept, so all of them must have had the same options."""

from __future__ import annotations

import argparse
import json
from collections.abc import Collection
from pathlib import Path

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
