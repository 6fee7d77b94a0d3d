"""Compute the norms on a CPU by loops in C (`norms.c`), compiled on first use with the system's C compiler.

That takes well under a second; the library stays in the user's cache folder. Without a compiler, and for dtypes that
the loops do not serve, the plain norms run. The threads are torch's: the OpenMP symbols resolve to the runtime that
torch has loaded, so there is no second pool of threads, and `torch.set_num_threads` applies.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import logging
import math
import os
import shutil
import stat
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from hf_adanorm.saving import write_file

from .fused import Arguments

logger = logging.getLogger(__name__)

_SOURCE = Path(__file__).with_name("norms.c")

# -ffast-math itself is left out: it drops infinities and NaN, and linking with it flushes the process's denormals.
_FLAGS = (
    *("-O3", "-std=gnu11", "-fPIC", "-fopenmp", "-fno-math-errno", "-fno-trapping-math", "-fno-signed-zeros"),
    *("-fassociative-math", "-funroll-loops"),
)
_GCC_FLAGS = ("-fvariable-expansion-in-unroller", "--param", "max-variable-expansions-in-unroller=4")
_CAPABILITY_FLAGS = {  # what torch found the CPU capable of, when it is an x86
    "AVX2": ("-mavx2", "-mfma"),
    "AVX512": (*("-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mfma"), "-mprefer-vector-width=512"),
}
_NAMES = {torch.float32: "float32", torch.bfloat16: "bfloat16"}
_MIN_PARALLEL = 32_768  # elements: below, waking threads up costs more than they save (torch's own grain size)

_pointer, _long, _float, _int = ctypes.c_void_p, ctypes.c_int64, ctypes.c_float, ctypes.c_int
_TYPES = {
    "forward": [*[_pointer] * 4, _long, _long, _float, _float, _float, _int, _int],
    "backward": [*[_pointer] * 5, _long, _long, _float, _float, _int, _float, _float, _int],
}
_Library = dict[tuple[str, torch.dtype], Callable[..., None]]


def supports(x: Tensor, normalized_shape: tuple[int, ...], dtype: torch.dtype) -> bool:
    """Return whether the loops serve this input and output dtype: float32 or bfloat16, one normalized dimension."""
    return (
        dtype in _NAMES
        and x.dtype is dtype
        and len(normalized_shape) == 1
        and x.ndim > 0
        and x.shape[-1] == normalized_shape[0]
        and not x.is_neg()
        and _library() is not None
    )


def forward(x: Tensor, dtype: torch.dtype, arguments: Arguments, with_stats: bool) -> tuple[Tensor, Tensor | None]:
    """Return z of x's shape, contiguous, and what the backward pass needs besides x, if `with_stats`.

    For float32 that is the rows' 1 / std and mean, (2, rows). For bfloat16 it is 1 / std alone, (1, rows), float32, so
    that no more is saved than nn.LayerNorm saves.

    Args:
        x: (*, H), float32 or bfloat16; it is copied if it is not contiguous.
        dtype: of z, which is x's.
    """
    x = x.contiguous()
    eps, C, k, centered, _, _ = arguments
    size, H = x.numel(), x.shape[-1]
    rows, z, stats = size // H, torch.empty_like(x), None
    rstd = mean = None
    if with_stats:
        stats = x.new_empty((2 if dtype is torch.float32 else 1, rows), dtype=torch.float32)
        rstd, mean = _addresses(stats, rows, dtype)
    threads = 1 if size < _MIN_PARALLEL else torch.get_num_threads()
    library = _library()
    assert library is not None
    library["forward", dtype](x.data_ptr(), z.data_ptr(), rstd, mean, rows, H, eps, C, k, centered, threads)
    return z, stats


def backward(dz: Tensor, x: Tensor | None, stats: Tensor, arguments: Arguments, dtype: torch.dtype) -> Tensor:
    """Return dl/dx from dl/dz, both of x's shape and `dtype`.

    Args:
        x, stats: what `forward` received and returned. x may be None if k = 0, C = 1 and the std is a constant.
    """
    dz = dz.contiguous()
    x = None if x is None else x.contiguous()
    _, C, k, centered, detach_mean, detach_std = arguments
    size, H = dz.numel(), dz.shape[-1]
    rows, dx = size // H, torch.empty_like(dz)
    threads = 1 if size < _MIN_PARALLEL else torch.get_num_threads()
    library = _library()
    assert library is not None
    library["backward", dtype](
        *(None if x is None else x.data_ptr(), dz.data_ptr(), dx.data_ptr(), *_addresses(stats, rows, dtype)),
        *(rows, H, C, k, centered, centered and not detach_mean, not detach_std, threads),
    )
    return dx


def _addresses(stats: Tensor, rows: int, dtype: torch.dtype) -> tuple[int, int | None]:
    """Return where the rows' 1 / std and their means lie, if they are kept."""
    address = stats.data_ptr()
    return address, address + 4 * rows if dtype is torch.float32 else None


@functools.cache
def _library() -> _Library | None:
    """Return the compiled functions by name and dtype, or None if they are not available. Try once per process."""
    try:
        handle = _load()
    except (OSError, RuntimeError, subprocess.SubprocessError) as error:
        logger.info("The norms run on torch's operators, their CPU loops are not available: %s", error)
        return None
    library: _Library = {}
    for name, types in _TYPES.items():
        for dtype, suffix in _NAMES.items():
            function = getattr(handle, f"{name}_{suffix}")
            function.argtypes, function.restype = types, None
            library[name, dtype] = function
    return library if _agrees(library) else None


def _agrees(library: _Library) -> bool:
    """Check one small row: a compiler that gets it wrong must not train a model."""
    x = torch.tensor([-1.0, 1.0, -1.0, 1.0], dtype=torch.float32, device="cpu")
    z = torch.empty_like(x)
    library["forward", torch.float32](x.data_ptr(), z.data_ptr(), None, None, 1, 4, 0.0, 1.0, 0.1, True, 1)
    return all(math.isclose(a, b, rel_tol=1e-6) for a, b in zip(z.tolist(), [-1.1, 0.9, -1.1, 0.9], strict=True))


def _load() -> ctypes.CDLL:
    """Return the shared library in the cache folder; compile it if it is missing or not whole.

    Raises:
        RuntimeError, OSError, subprocess.SubprocessError: no compiler, no place to write that is this user's own, or
            it did not compile.
    """
    if sys.platform != "linux":
        raise RuntimeError(f"{sys.platform} is not Linux")
    flags = (*_FLAGS, *_CAPABILITY_FLAGS.get(torch.backends.cpu.get_cpu_capability(), ()))
    key = hashlib.sha256(
        "\0".join([_SOURCE.read_text(), *flags, *_GCC_FLAGS, os.uname().machine]).encode()
    ).hexdigest()[:16]
    target = _cache_folder() / f"adanorm_{key}.so"
    if (handle := _open(target)) is None:
        library = _compile(flags)
        write_file(target, library + hashlib.sha256(library).digest())
        target.chmod(0o600)
        handle = _open(target)
    if handle is None:
        raise RuntimeError(f"{target} is not what was written there")
    return handle


def _open(path: Path) -> ctypes.CDLL | None:
    """Open the library at `path`. Return None for a link, another user's file, one that others may write to, or one
    that is not whole: mapping a truncated file ends the process. The file ends with its SHA-256."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError:
        return None
    with open(descriptor, "rb") as file:
        info, content = os.fstat(descriptor), file.read()
        whole = hashlib.sha256(content[:-32]).digest() == content[-32:]
        if info.st_uid != os.geteuid() or info.st_mode & 0o022 or not whole:
            return None
        return ctypes.CDLL(f"/proc/self/fd/{descriptor}", mode=os.RTLD_NOW)  # the very file that was looked at


def _compile(flags: Sequence[str]) -> bytes:
    compiler = next((path for name in ("gcc", "cc", "clang") if (path := shutil.which(name))), None)
    if compiler is None:
        raise RuntimeError("there is no C compiler (gcc, cc or clang) on the PATH")
    with tempfile.TemporaryDirectory() as work:
        source, compiled, linked = (Path(work, name) for name in ("adanorm.c", "adanorm.o", "adanorm.so"))
        source.write_bytes(_SOURCE.read_bytes())
        gcc_flags = _GCC_FLAGS if "clang" not in compiler else ()
        _run(compiler, *flags, *gcc_flags, "-c", str(source), "-o", str(compiled))
        # Linked without -fopenmp, so that the OpenMP functions come from the runtime that torch has loaded.
        _run(compiler, "-shared", str(compiled), "-o", str(linked), "-lm")
        return linked.read_bytes()


def _run(*command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    if done.returncode:
        raise RuntimeError(f"{command[0]} failed: {done.stderr.strip()[:500]}")


def _cache_folder() -> Path:
    """Return a folder that belongs to this user alone, as its content is loaded as code."""
    base = os.environ.get("XDG_CACHE_HOME", "")
    cache = (Path(base) if os.path.isabs(base) else Path.home() / ".cache") / "hf_adanorm"
    cache.mkdir(mode=0o700, parents=True, exist_ok=True)
    info = cache.lstat()
    if not stat.S_ISDIR(info.st_mode) or info.st_uid != os.geteuid():
        raise RuntimeError(
            f"{cache} is a link or belongs to another user, refusing to execute its files: set XDG_CACHE_HOME to a "
            "folder of your own"
        )
    if info.st_mode & 0o077:
        cache.chmod(0o700)
    return cache
