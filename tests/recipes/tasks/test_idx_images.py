"""MNIST's IDX files."""

import numpy as np
import pytest

from tasks.data import DataError, DataOptions, load_splits
from tasks.idx_images import load_idx_images, read_idx, write_idx


def test_idx_files_are_read_back_and_broken_ones_named(tmp_path):
    images = np.arange(2 * 3 * 4, dtype=np.uint8).reshape(2, 3, 4)
    path = tmp_path / "few-images-idx3-ubyte.gz"
    write_idx(path, images)
    assert (read_idx(path) == images).all()
    with pytest.raises(FileNotFoundError, match="few-labels-idx1-ubyte"):
        load_idx_images(path)
    write_idx(tmp_path / "few-labels-idx1-ubyte.gz", np.zeros(3, dtype=np.uint8))
    with pytest.raises(DataError, match=r"images of shape \(2, 3, 4\), but labels of shape \(3,\)"):
        load_splits(DataOptions(train_file=str(path), validation_file=str(path)))
    (tmp_path / "cut").write_bytes(b"\x00\x00\x08\x01\x00\x00\x00\x09abc")
    with pytest.raises(ValueError, match="cut: not an IDX file"):
        read_idx(tmp_path / "cut")
