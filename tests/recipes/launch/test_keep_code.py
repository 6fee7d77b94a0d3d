"""The exit code that a launcher loses."""

import subprocess
import sys
from pathlib import Path

import classification

RECIPES = Path(classification.__file__).parent


def test_a_launcher_that_turns_every_code_into_1_is_made_to_keep_it():
    keep = [sys.executable, RECIPES / "launch" / "keep_code.py", "sh", "-c"]
    for arguments, code in (("--nrom x", 2), ("--help", 0)):
        launcher = f"{sys.executable} {RECIPES / 'classification.py'} {arguments} || exit 1"
        assert subprocess.run([*keep, launcher], capture_output=True).returncode == code
    assert subprocess.run([*keep, "exit 7"]).returncode == 7
