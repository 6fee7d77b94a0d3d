"""Start a launcher, and end with the exit code of the recipe that it starts, which launchers turn into 1.

    python recipes/launch/keep_code.py torchrun --nproc_per_node 2 recipes/translation.py --config CONFIG

SIGTERM and Ctrl-C are handed on. A launcher whose recipe said nothing keeps its own code.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path


def main(command: list[str]) -> int:
    with tempfile.TemporaryDirectory() as folder:
        note = Path(folder) / "code"
        child = subprocess.Popen(command, env={**os.environ, "HF_ADANORM_EXIT_CODE": str(note)})
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda number, frame: child.send_signal(number))
        code = child.wait()
        return int(note.read_text()) if note.exists() else code if code >= 0 else 128 - code


if __name__ == "__main__":
    if len(sys.argv) < 2:
        sys.exit(__doc__)
    sys.exit(main(sys.argv[1:]))
