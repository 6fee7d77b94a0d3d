"""Files that are whole or unchanged, in folders that others may have had their hands in."""

from __future__ import annotations

import os
import secrets
from pathlib import Path

TEMPORARY = ".tmp-"  # how names begin that are not yet, or no longer, in their place


def write_file(path: str | os.PathLike[str], content: str | bytes) -> None:
    """Write bytes, or text as UTF-8 with its line endings as they are: the file is the old one or the whole new one.

    The temporary file beside it has a random name and is made exclusively, so a link that waits there is not followed;
    a link at `path` itself is replaced, not written through.
    """
    path = Path(path)
    temporary = path.with_name(f"{TEMPORARY}{path.name}-{secrets.token_hex(8)}")
    try:
        with open(temporary, "xb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def leads_outside(path: Path, folder: Path | None = None) -> bool:
    """Tell whether `path` is, or is behind, a link out of `folder` (by default its own). In the Hub's cache, files are
    links into the repository's blobs."""
    folder = (path.parent if folder is None else folder).resolve()
    repository = folder.parent.parent if folder.parent.name == "snapshots" else folder
    return not path.resolve().is_relative_to(repository)
