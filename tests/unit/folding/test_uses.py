"""The outputs of a model by their paths, and which of them are by-products."""

from __future__ import annotations

import torch

from hf_adanorm.folding.watch import is_side_output, named_outputs


def test_outputs_have_paths() -> None:
    tensors = torch.zeros(4).unbind()
    output = {"logits": tensors[0], "hidden_states": (tensors[1], tensors[2]), "loss": None}
    assert [path for path, _ in named_outputs(output)] == ["logits", "hidden_states.0", "hidden_states.1"]
    assert [path for path, _ in named_outputs(tensors[3])] == ["output"]


def test_hidden_states_and_towers_are_by_products() -> None:
    assert is_side_output("hidden_states.0")
    assert is_side_output("text_model_output.pooler_output")
    assert not is_side_output("logits")
