"""The compiled loops' cache: what lies there is run, so only what this user put there whole is."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from hf_adanorm import AdaNorm
from hf_adanorm.kernels import cpu

pytestmark = pytest.mark.skipif(
    not (sys.platform == "linux" and shutil.which("gcc")), reason="the loops need gcc on Linux"
)


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(folder))
        cpu._load()
    return folder


@pytest.fixture
def cache(compiled: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder, with the library compiled."""
    shutil.copytree(compiled, tmp_path, dirs_exist_ok=True)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "hf_adanorm"


def library(cache: Path) -> Path:
    (path,) = cache.iterdir()
    return path


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:4096])


def change(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[2000] ^= 1
    path.write_bytes(content)


def open_to_others(path: Path) -> None:
    path.chmod(0o666)


def link(path: Path) -> None:
    path.rename(path.parent.parent / "elsewhere.so")
    path.symlink_to(path.parent.parent / "elsewhere.so")


def test_the_folder_and_the_library_are_for_this_user_alone(cache: Path) -> None:
    assert cache.stat().st_mode & 0o777 == 0o700
    assert library(cache).stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize("harm", [cut, change, open_to_others, link])
def test_a_library_that_is_not_as_it_was_written_is_not_mapped_but_made_again(
    cache: Path, harm: Callable[[Path], None]
) -> None:
    path = library(cache)
    content = path.read_bytes()
    harm(path)
    assert cpu._open(path) is None
    cpu._load()
    assert path.read_bytes() == content
    assert not path.is_symlink()
    assert path.stat().st_mode & 0o777 == 0o600


def test_a_folder_that_others_may_write_to_is_closed(cache: Path) -> None:
    cache.chmod(0o777)
    cpu._load()
    assert cache.stat().st_mode & 0o777 == 0o700


def test_a_folder_that_is_a_link_is_refused(cache: Path) -> None:
    cache.rename(cache.parent / "theirs")
    cache.symlink_to(cache.parent / "theirs")
    with pytest.raises(RuntimeError, match="XDG_CACHE_HOME"):
        cpu._load()


@pytest.mark.skipif(os.geteuid() != 0, reason="only root gives files away")
@pytest.mark.parametrize("whose", ["folder", "library"])
def test_what_belongs_to_another_user_is_not_mapped(cache: Path, whose: str) -> None:
    path = library(cache)
    os.chown(cache if whose == "folder" else path, 12345, 12345)
    if whose == "folder":
        with pytest.raises(RuntimeError, match="another user"):
            cpu._load()
    else:
        assert cpu._open(path) is None


@pytest.mark.parametrize(
    "mode", [torch.device("meta"), FakeTensorMode(allow_non_fake_inputs=True)], ids=["meta", "fake"]
)
def test_the_first_training_step_may_happen_under_another_default_device(cache: Path, mode: Any) -> None:
    x, norm = torch.randn(2, 8, requires_grad=True), AdaNorm(8)
    expected = norm.compute(x)
    cpu._library.cache_clear()
    torch.set_default_dtype(torch.float64)
    try:
        with mode:
            z = norm(x)
        assert cpu._library() is not None
    finally:
        torch.set_default_dtype(torch.float32)
    if isinstance(mode, torch.device):
        torch.testing.assert_close(z, expected)


def test_backward_under_a_mode_that_records(cache: Path) -> None:
    x = torch.randn(4, 8, requires_grad=True)
    z = AdaNorm(8)(x)
    traced = make_fx(lambda dz: torch.autograd.grad(z, x, dz, retain_graph=True)[0])(torch.ones_like(z))
    dz = torch.randn(4, 8)
    torch.testing.assert_close(traced(dz), torch.autograd.grad(z, x, dz)[0])
