"""The forward and the backward pass of AdaNorm and DetachNorm as one loop each, for training on a CPU.

The norm is bound by memory: made of torch's own operators it reads and writes the activations twice as often as a
fused loop has to. The loop is plain C, compiled on first use with the system's C compiler (well under a second) and
kept in the user's cache folder; without a compiler, or for a dtype that it does not serve, the norms run on torch's
operators as everywhere else. The threads are those of torch: the OpenMP symbols resolve to the runtime that torch has
loaded already, so there is no second pool of threads, and `torch.set_num_threads` holds.
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

from .saving import write_file

logger = logging.getLogger(__name__)

_SOURCE = r"""
#include <math.h>
#include <stdint.h>
#include <string.h>

/* bfloat16 is the upper half of a float; rounding is to the nearest, ties to even, as torch does. */
static inline float from_bf16(uint16_t v) { uint32_t u = (uint32_t)v << 16; float f; memcpy(&f, &u, 4); return f; }
static inline uint16_t to_bf16(float f) {
  uint32_t u; memcpy(&u, &f, 4);
  uint32_t rounded = (u + 0x7fffu + ((u >> 16) & 1u)) >> 16;
  return (u & 0x7fffffffu) > 0x7f800000u ? 0x7fc0 : (uint16_t)rounded;
}
#define AS_IS(v) (v)
#define SIMD(clauses) _Pragma(#clauses)

#define DEFINE(NAME, T, LOAD, STORE)                                                                              \
static float mean_##NAME(const T *restrict x, int64_t H) {                                                        \
  float mean = 0;                                                                                                 \
  SIMD(omp simd reduction(+:mean))                                                                                \
  for (int64_t j = 0; j < H; j++) mean += LOAD(x[j]);                                                             \
  return mean / H;                                                                                                \
}                                                                                                                 \
void forward_##NAME(const T *restrict X, T *restrict Z, float *restrict MEAN, float *restrict RSTD,               \
                    int64_t rows, int64_t H, float eps, float C, float k, int threads) {                          \
  SIMD(omp parallel for num_threads(threads) if(threads > 1))                                                     \
  for (int64_t i = 0; i < rows; i++) {                                                                            \
    const T *restrict x = X + i * H; T *restrict z = Z + i * H;                                                   \
    float mean = mean_##NAME(x, H), var = 0;                                                                      \
    if (i + 1 < rows) /* the next row comes in while this one is computed */                                      \
      for (int64_t j = 0; j < H; j += 64 / sizeof(T)) __builtin_prefetch(x + H + j);                              \
    SIMD(omp simd reduction(+:var))                                                                               \
    for (int64_t j = 0; j < H; j++) { float d = LOAD(x[j]) - mean; var += d * d; }                                \
    for (int64_t j = 0; j < H; j += 64 / sizeof(T)) __builtin_prefetch(z + j, 1); /* its lines, to be written */  \
    float rstd = 1.0f / sqrtf(var / H + eps);                                                                     \
    if (MEAN) MEAN[i] = mean;                                                                                     \
    RSTD[i] = rstd;                                                                                               \
    SIMD(omp simd)                                                                                                \
    for (int64_t j = 0; j < H; j++) { float y = (LOAD(x[j]) - mean) * rstd; z[j] = STORE((C - C * k * y) * y); }  \
  }                                                                                                               \
}                                                                                                                 \
/* dy = phi(y) * dz with phi constant; dx = rstd * (dy - mean(dy) - y * mean(dy * y)). The second term comes      \
   from the mean and the third from the standard deviation: a factor of 0 takes that one for a constant. */       \
void backward_##NAME(const T *restrict X, const T *restrict DZ, T *restrict DX,                                   \
                     const float *restrict MEAN, const float *restrict RSTD, int64_t rows, int64_t H,             \
                     float C, float k, float through_mean, float through_std, int threads) {                      \
  SIMD(omp parallel for num_threads(threads) if(threads > 1))                                                     \
  for (int64_t i = 0; i < rows; i++) {                                                                            \
    const T *restrict x = X + i * H; const T *restrict dz = DZ + i * H; T *restrict dx = DX + i * H;              \
    float mean = MEAN ? MEAN[i] : mean_##NAME(x, H), rstd = RSTD[i], mean_dy = 0, mean_dyy = 0;                   \
    SIMD(omp simd reduction(+:mean_dy, mean_dyy))                                                                 \
    for (int64_t j = 0; j < H; j++) {                                                                             \
      float y = (LOAD(x[j]) - mean) * rstd, dy = (C - C * k * y) * LOAD(dz[j]);                                   \
      mean_dy += dy; mean_dyy += dy * y;                                                                          \
    }                                                                                                             \
    for (int64_t j = 0; j < H; j += 64 / sizeof(T)) __builtin_prefetch(dx + j, 1);                                \
    mean_dy *= through_mean / H; mean_dyy *= through_std / H;                                                     \
    SIMD(omp simd)                                                                                                \
    for (int64_t j = 0; j < H; j++) {                                                                             \
      float y = (LOAD(x[j]) - mean) * rstd, dy = (C - C * k * y) * LOAD(dz[j]);                                   \
      dx[j] = STORE(rstd * (dy - mean_dy - y * mean_dyy));                                                        \
    }                                                                                                             \
  }                                                                                                               \
}                                                                                                                 \
/* The same for phi = 1 and a constant standard deviation, which needs no x. */                                   \
void backward_constant_std_##NAME(const T *restrict DZ, T *restrict DX, const float *restrict RSTD,               \
                                  int64_t rows, int64_t H, float through_mean, int threads) {                     \
  SIMD(omp parallel for num_threads(threads) if(threads > 1))                                                     \
  for (int64_t i = 0; i < rows; i++) {                                                                            \
    const T *restrict dz = DZ + i * H; T *restrict dx = DX + i * H;                                               \
    float rstd = RSTD[i], mean_dy = through_mean ? through_mean * mean_##NAME(dz, H) : 0;                         \
    SIMD(omp simd)                                                                                                \
    for (int64_t j = 0; j < H; j++) dx[j] = STORE(rstd * (LOAD(dz[j]) - mean_dy));                                \
  }                                                                                                               \
}
DEFINE(float32, float, AS_IS, AS_IS)
DEFINE(bfloat16, uint16_t, from_bf16, to_bf16)
"""

# -ffast-math itself is left out: it drops infinities and NaN, and linking with it flushes the process's denormals.
_FLAGS = (
    *("-O3", "-std=gnu11", "-fPIC", "-fopenmp", "-fno-math-errno", "-fno-trapping-math", "-fno-signed-zeros"),
    *("-fassociative-math", "-funroll-loops"),
)
_GCC_FLAGS = ("-fvariable-expansion-in-unroller", "--param", "max-variable-expansions-in-unroller=4")
_CAPABILITY_FLAGS = {  # what torch found the CPU capable of, when it is an x86
    "AVX2": ("-mavx2", "-mfma"),
    "AVX512": (
        *("-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mfma"),
        "-mprefer-vector-width=512",
    ),
}
_NAMES = {torch.float32: "float32", torch.bfloat16: "bfloat16"}
_MIN_PARALLEL = 32_768  # elements: below, waking threads up costs more than they save (torch's own grain size)

_pointer, _long, _float, _int = ctypes.c_void_p, ctypes.c_int64, ctypes.c_float, ctypes.c_int
_ARGUMENTS = {
    "forward": [*[_pointer] * 4, _long, _long, _float, _float, _float, _int],
    "backward": [*[_pointer] * 5, _long, _long, _float, _float, _float, _float, _int],
    "backward_constant_std": [*[_pointer] * 3, _long, _long, _float, _int],
}
_Library = dict[tuple[str, torch.dtype], Callable[..., None]]


def supports(x: Tensor, normalized_shape: tuple[int, ...], dtype: torch.dtype) -> bool:
    """Whether the loops serve this input and output: float32 or bfloat16 on a CPU, one normalised dimension."""
    return (
        x.is_cpu
        and dtype in _NAMES
        and x.dtype == dtype
        and len(normalized_shape) == 1
        and x.shape[-1:] == normalized_shape
        and _library() is not None
    )


def forward(x: Tensor, dtype: torch.dtype, eps: float, C: float = 1.0, k: float = 0.0) -> tuple[Tensor, Tensor]:
    """z = C * (1 - k * y) * y with y = (x - mean) * rstd, over the last axis.

    Args:
        x: (*, H), float32 or bfloat16, in any layout (a copy is made of one that is not contiguous).
        dtype: of z, which is x's.
        eps, C, k: as in `AdaNorm`; the defaults give z = y.

    Returns:
        z of x's shape and dtype, contiguous; and what the backward pass needs besides x, float32: for float32 input
        the rows' rstd and mean, (2, rows); for bfloat16 their rstd, (1, rows), so that no more is saved than
        nn.LayerNorm saves, whose statistics are bfloat16 then.
    """
    library = _library()
    assert library is not None
    x = x.contiguous()
    H = x.shape[-1]
    rows, z = x.numel() // H, torch.empty_like(x)
    stats = x.new_empty((2 if dtype is torch.float32 else 1, rows), dtype=torch.float32)
    library["forward", dtype](
        x.data_ptr(), z.data_ptr(), *_addresses(stats, rows, dtype), rows, H, eps, C, k, _num_threads(x)
    )
    return z, stats


def backward(
    dz: Tensor,
    x: Tensor | None,
    stats: Tensor,
    C: float = 1.0,
    k: float = 0.0,
    through_mean: bool = True,
    through_std: bool = True,
) -> Tensor:
    """dl/dx from dl/dz (of x's shape and dtype), phi taken for a constant.

    Args:
        x, stats: what `forward` was given and what it returned; x may be None with k = 0, C = 1 and a constant std.
        through_mean, through_std: False takes the statistic for a constant, as DetachNorm does.
    """
    library = _library()
    assert library is not None
    dz = dz.contiguous()
    dtype, H = dz.dtype, dz.shape[-1]
    rows, dx, threads = dz.numel() // H, torch.empty_like(dz), _num_threads(dz)
    if x is None:
        library["backward_constant_std", dtype](
            dz.data_ptr(), dx.data_ptr(), stats.data_ptr(), rows, H, through_mean, threads
        )
    else:
        x = x.contiguous()
        library["backward", dtype](
            *(x.data_ptr(), dz.data_ptr(), dx.data_ptr(), *_addresses(stats, rows, dtype)),
            *(rows, H, C, k, through_mean, through_std, threads),
        )
    return dx


def _addresses(stats: Tensor, rows: int, dtype: torch.dtype) -> tuple[int | None, int]:
    """Of the means, if they are kept, and of the rstds."""
    address = stats.data_ptr()
    return (address + 4 * rows if dtype is torch.float32 else None), address


def _num_threads(x: Tensor) -> int:
    return torch.get_num_threads() if x.numel() >= _MIN_PARALLEL else 1


@functools.cache
def _library() -> _Library | None:
    """The compiled functions by name and dtype, or None where they cannot be had; tried once a process."""
    try:
        handle = _load()
    except (OSError, RuntimeError, subprocess.SubprocessError) as error:
        logger.info("The norms run on torch's operators, their CPU loops are not available: %s", error)
        return None
    library: _Library = {}
    for name, types in _ARGUMENTS.items():
        for dtype, suffix in _NAMES.items():
            function = getattr(handle, f"{name}_{suffix}")
            function.argtypes, function.restype = types, None
            library[name, dtype] = function
    return library if _agrees(library) else None


def _agrees(library: _Library) -> bool:
    """One small row by hand: a compiler that gets it wrong must not train anyone's model."""
    x = torch.tensor([-1.0, 1.0, -1.0, 1.0], dtype=torch.float32, device="cpu")
    z, stats = torch.empty_like(x), x.new_empty(2)
    library["forward", torch.float32](
        x.data_ptr(), z.data_ptr(), stats.data_ptr(), stats.data_ptr() + 4, 1, 4, 0.0, 1.0, 0.1, 1
    )
    return all(math.isclose(a, b, rel_tol=1e-6) for a, b in zip(z.tolist(), [-1.1, 0.9, -1.1, 0.9], strict=True))


def _load() -> ctypes.CDLL:
    """The shared library in the cache folder, compiled when it is not there or not whole.

    Raises:
        RuntimeError, OSError, subprocess.SubprocessError: no compiler, no place to write that is this user's own, or
            it did not compile.
    """
    if sys.platform != "linux":
        raise RuntimeError(f"{sys.platform} is not Linux")
    flags = (*_FLAGS, *_CAPABILITY_FLAGS.get(torch.backends.cpu.get_cpu_capability(), ()))
    key = hashlib.sha256("\0".join([_SOURCE, *flags, *_GCC_FLAGS, os.uname().machine]).encode()).hexdigest()[:16]
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
    """The library at `path`, or None: it is another user's or a link, others may write to it, or it is not whole (its
    SHA-256 stands at its end; to map a file that was cut short ends the process)."""
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
        source.write_text(_SOURCE)
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
    """A folder of this user's own, which nobody else enters: what lies there is loaded as code."""
    base = os.environ.get("XDG_CACHE_HOME", "")
    cache = (Path(base) if os.path.isabs(base) else Path.home() / ".cache") / "hf_adanorm"
    cache.mkdir(mode=0o700, parents=True, exist_ok=True)
    info = cache.lstat()
    if not stat.S_ISDIR(info.st_mode) or info.st_uid != os.geteuid():
        raise RuntimeError(
            f"{cache} is a link or another user's, and what lies there would be run: set XDG_CACHE_HOME to a folder "
            "of your own"
        )
    if info.st_mode & 0o077:
        cache.chmod(0o700)
    return cache
