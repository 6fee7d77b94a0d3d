"""Reads MNIST's file format, IDX: a file of images, and one of labels in the same folder, plain or gzipped."""

from __future__ import annotations

import gzip
import struct
from pathlib import Path

import numpy as np
from datasets import ClassLabel, Dataset, Features, Image
from PIL import Image as PilImage


def read_idx(path: str | Path) -> np.ndarray:
    """Return the unsigned bytes of an IDX file, in its shape. Raises ValueError naming a file of another kind."""
    path = Path(path)
    data = path.read_bytes()
    if data[:2] == b"\x1f\x8b":
        data = gzip.decompress(data)
    kind, dims = (data[2], data[3]) if len(data) > 4 and data[:2] == b"\x00\x00" else (0, 0)
    shape = struct.unpack(f">{dims}I", data[4 : 4 + 4 * dims]) if len(data) >= 4 + 4 * dims else ()
    if kind != 0x08 or not shape or len(data) != 4 + 4 * dims + int(np.prod(shape)):
        raise ValueError(f"{path}: not an IDX file of unsigned bytes, or cut off")
    return np.frombuffer(data, dtype=np.uint8, offset=4 + 4 * dims).reshape(shape)


def write_idx(path: str | Path, array: np.ndarray) -> None:
    """Write unsigned bytes as a gzipped IDX file."""
    head = struct.pack(f">BBBB{array.ndim}I", 0, 0, 0x08, array.ndim, *array.shape)
    Path(path).write_bytes(gzip.compress(head + array.astype(np.uint8).tobytes(), mtime=0))


def is_idx(path: str | Path) -> bool:
    """Return whether the name is that of an IDX file of images."""
    return "images-idx3-ubyte" in Path(path).name


def labels_beside(path: str | Path) -> Path:
    """Return the file of labels that belongs to one of images."""
    return Path(path).with_name(Path(path).name.replace("images-idx3", "labels-idx1"))


def load_idx_images(path: str | Path) -> Dataset:
    """Return columns `image` and `label` of an IDX file of images and of the labels next to it.

    Raises ValueError when a file is broken or the two differ in number, FileNotFoundError when there are no labels.
    """
    path = Path(path)
    labels_path = labels_beside(path)
    if not labels_path.is_file():
        raise FileNotFoundError(f"{labels_path}: no such file; the labels must be in the folder of {path.name}")
    images, labels = read_idx(path), read_idx(labels_path)
    if images.ndim != 3 or labels.ndim != 1 or len(images) != len(labels):
        raise ValueError(f"{path}: images of shape {images.shape}, but labels of shape {labels.shape}")
    names = [str(number) for number in range(int(labels.max(initial=0)) + 1)]
    features = Features({"image": Image(), "label": ClassLabel(names=names)})
    columns = {"image": [PilImage.fromarray(image) for image in images], "label": labels.tolist()}
    return Dataset.from_dict(columns, features=features)
