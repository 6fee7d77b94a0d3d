"""What one watched pass shows: which layers read a norm and how, and what the model returns."""

from __future__ import annotations

import gc
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from transformers.pytorch_utils import Conv1D

from hf_adanorm.detection import iter_norms
from hf_adanorm.folding.shadows import Trace
from hf_adanorm.folding.watch import (
    Watched,
    channel_dim,
    is_linear_map,
    is_side_output,
    named_outputs,
    num_inputs,
    sample,
    watch,
)
from tests.zoo.fold_blocks import WIDTH, Block


def watched(block: nn.Module, folder: Path | None = None) -> Watched:
    infos = {name: info for name, _, info in iter_norms(block)}
    return watch(block.eval(), infos, {"x": torch.randn(2, 5, WIDTH)}, folder)


def test_columns_come_in_the_order_of_the_layer_s_inputs() -> None:
    (use,) = watched(Block(lambda self, y: self.linear(y.flip(-1)))).uses["norm"]
    assert use.columns == tuple(reversed(range(WIDTH)))


def test_outputs_of_norms_wait_in_files_and_no_shadow_is_left_to_the_garbage_collector(tmp_path: Path) -> None:
    gc.collect()
    gc.disable()
    try:
        block = Block(lambda self, y: self.linear(self.norm(y)))
        seen = watched(block, tmp_path)
        assert [tuple(load_file(file)["rows"].shape) for file in seen.norm_outputs["norm"]] == [(10, WIDTH)] * 2
        assert seen.outputs.keys() == {"output"}
        assert not [thing for thing in gc.get_objects() if type(thing) is Trace]
    finally:
        gc.enable()


@pytest.mark.parametrize(
    ("module", "ndim", "dim"),
    [(nn.Linear(3, 5), 3, 2), (Conv1D(5, 3), 3, 2), (nn.Conv1d(3, 5, 2), 3, 1), (nn.Conv2d(3, 5, 2), 4, 1)],
)
def test_linear_layers_and_where_their_features_lie(module: nn.Module, ndim: int, dim: int) -> None:
    assert is_linear_map(module)
    assert num_inputs(module) == 3
    assert channel_dim(module, ndim) == dim


def test_a_forward_of_its_own_is_no_linear_layer() -> None:
    class Doubled(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return 2 * super().forward(x)

    assert not is_linear_map(Doubled(3, 5))


def test_outputs_have_paths_and_hidden_states_and_towers_are_by_products() -> None:
    tensors = torch.zeros(4).unbind()
    output = {"logits": tensors[0], "hidden_states": (tensors[1], tensors[2]), "loss": None}
    paths = ["logits", "hidden_states.0", "hidden_states.1"]
    assert [path for path, _ in named_outputs(output)] == paths
    assert [path for path, _ in named_outputs(tensors[3])] == ["output"]
    assert [is_side_output(path) for path in (*paths, "text_model_output.pooler_output")] == [False, True, True, True]


def test_a_sample_of_a_large_output_visits_every_column() -> None:
    columns = sample(torch.arange(256).expand(4096, 256))["output"]
    assert len(columns) < 1 << 17
    assert set(columns.tolist()) == set(range(256))
