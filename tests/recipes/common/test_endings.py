"""How runs end: one line, and the code that says what to do next."""

import errno
import inspect
import re
import warnings

import pytest

from common import endings
from common.endings import DataError, DivergedError, SaveError, clear_endings, clear_errors
from tests.recipes.fault_runs import arguments
from tests.recipes.recipe_process import two_processes


@pytest.mark.parametrize(
    ("context", "error", "code"),
    [
        (clear_errors, ValueError("no such option"), endings.EXIT_BAD_INPUT),
        (clear_endings, DataError("row 3 is not an image"), endings.EXIT_BAD_INPUT),
        (clear_endings, DivergedError("step 7: loss nan", 7), endings.EXIT_DIVERGED),
        (clear_endings, SaveError("checkpoint-4 cannot be written"), endings.EXIT_CANNOT_SAVE),
        (clear_endings, OSError(errno.ENOSPC, "No space left on device"), endings.EXIT_CANNOT_SAVE),
    ],
)
def test_an_error_ends_in_one_line_with_its_code(context, error, code, capsys):
    with pytest.raises(SystemExit) as ended, context():
        raise error
    assert ended.value.code == code
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: {error}")


def test_an_unexpected_error_keeps_its_traceback():
    with pytest.raises(OSError, match="Permission"), clear_endings():
        raise PermissionError(errno.EACCES, "Permission denied")


@pytest.mark.parametrize(
    ("rank", "local_rank", "alike", "said"), [(1, 1, True, ""), (8, 0, True, "error: x\n"), (1, 1, False, "process 1")]
)
def test_what_all_processes_find_is_printed_once_per_machine(rank, local_rank, alike, said, monkeypatch, capsys):
    monkeypatch.setenv("RANK", str(rank))
    monkeypatch.setenv("LOCAL_RANK", str(local_rank))
    with pytest.raises(SystemExit):
        endings.end("x", 2, alike=alike)
    assert said in capsys.readouterr().err
    assert said or not capsys.readouterr().err


@pytest.mark.parametrize(("rank", "said"), [(0, "warning: two lines, one warning\n"), (1, "")])
def test_a_warning_is_one_line_of_the_first_process(rank, said, monkeypatch):
    monkeypatch.setattr(warnings, "formatwarning", warnings.formatwarning)
    monkeypatch.setenv("LOCAL_RANK", str(rank))
    endings.plain_warnings()
    assert warnings.formatwarning("two lines,\none warning", UserWarning, "data.py", 7) == said


def test_the_help_text_lists_every_code():
    codes = {value for name, value in inspect.getmembers(endings) if re.match("EXIT_(?!CODES)", name)}
    assert {int(code) for code in re.findall(r"^  (\d+) ", endings.EXIT_CODES, re.MULTILINE)} == codes | {0}


def test_a_full_disk_of_one_of_two_processes_is_reported_and_the_other_does_not_hang(data, tmp_path):
    argv = arguments("classification", data, tmp_path / "run")
    codes, said = two_processes("classification", argv, tmp_path, first_file_size=20_000)
    assert codes[0] == endings.EXIT_CANNOT_SAVE, said
    assert codes[1] != 0
    assert "checkpoint-4 cannot be written" in said[0]
