"""The mean of the last checkpoints."""

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from common.weight_average import load_average


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(2, 2, bias=False), nn.Linear(2, 2, bias=False)
        self.second.weight = self.first.weight
        self.register_buffer("count", torch.tensor(0))


def write(folder, step, **tensors):
    (folder / f"checkpoint-{step}").mkdir()
    save_file(tensors, folder / f"checkpoint-{step}" / "model.safetensors")


def test_floats_are_averaged_and_all_else_is_of_the_newest(tmp_path):
    for step, value in ((5, 100.0), (20, 1.0), (100, 4.0)):
        write(tmp_path, step, **{"first.weight": torch.full((2, 2), value), "count": torch.tensor(step)})
    model = Tied()
    assert load_average(model, tmp_path, 2) == [20, 100]
    assert model.second.weight.unique().tolist() == [2.5]
    assert model.count == 100


def test_checkpoints_of_another_model_or_none_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="holds no checkpoint to average"):
        load_average(Tied(), tmp_path, 2)
    write(tmp_path, 1, other=torch.ones(1))
    with pytest.raises(RuntimeError, match=r"of another model: .*'other'"):
        load_average(Tied(), tmp_path, 2)
