"""The one way in which files are written, and folders that a stranger has laid out."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from hf_adanorm.saving.files import leads_outside, write_file


def test_text_and_bytes_arrive_as_they_are(tmp_path: Path) -> None:
    write_file(tmp_path / "a", "ä\r\n\n")
    write_file(str(tmp_path / "b"), b"\xff\x00")
    assert (tmp_path / "a").read_bytes() == "ä\r\n\n".encode()
    assert (tmp_path / "b").read_bytes() == b"\xff\x00"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b"]


def test_a_new_file_has_the_permissions_of_any_other(tmp_path: Path) -> None:
    write_file(tmp_path / "a", "")
    (tmp_path / "b").touch()
    assert (tmp_path / "a").stat().st_mode == (tmp_path / "b").stat().st_mode


def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a").write_text("old")

    def full_disk(descriptor: int) -> None:
        raise OSError("No space left on device")

    monkeypatch.setattr(os, "fsync", full_disk)
    with pytest.raises(OSError, match="No space"):
        write_file(tmp_path / "a", "new")
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {"a": "old"}


def test_no_link_is_written_through(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    victim = tmp_path / "victim"
    victim.write_text("theirs")
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "a").symlink_to(victim)
    write_file(folder / "a", "ours")
    assert not (folder / "a").is_symlink()
    monkeypatch.setattr("secrets.token_hex", lambda size: "guessed")
    (folder / ".tmp-b-guessed").symlink_to(victim)
    with pytest.raises(FileExistsError):
        write_file(folder / "b", "ours")
    assert victim.read_text() == "theirs"


def test_links_within_a_folder_and_into_the_blobs_of_the_hubs_cache_stay(tmp_path: Path) -> None:
    snapshot = tmp_path / "models--a--b" / "snapshots" / "1234"
    snapshot.mkdir(parents=True)
    blob, secret = tmp_path / "models--a--b" / "blobs" / "5678", tmp_path / "secret"
    blob.parent.mkdir()
    blob.touch()
    secret.touch()
    for name, target in (("blob", blob), ("secret", secret), ("beside", snapshot / "plain"), ("lost", "../nowhere")):
        (snapshot / name).symlink_to(target)
    (snapshot / "plain").touch()
    outside = {path.name for path in snapshot.iterdir() if leads_outside(path)}
    assert outside == {"secret"}
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "blob").symlink_to(blob)
    assert leads_outside(tmp_path / "folder" / "blob")
