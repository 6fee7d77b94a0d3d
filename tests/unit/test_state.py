"""All state of a model is put back after something was done with it."""

from __future__ import annotations

import random
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from torch import Tensor, nn

from hf_adanorm import calibrate_k, fold_affine
from hf_adanorm.running import evaluating
from hf_adanorm.state import State

VOCAB = 40


class Merging(nn.Linear):
    """A layer that merges a low-rank update into its weight in evaluation mode, as loralib's do."""

    def __init__(self, width: int) -> None:
        super().__init__(width, width)
        self.a, self.b = nn.Parameter(torch.randn(2, width)), nn.Parameter(torch.randn(width, 2))
        self.merged = False

    def train(self, mode: bool = True) -> nn.Module:
        super().train(mode)
        if mode is self.merged:
            self.weight.data += (self.b @ self.a) * (-1 if mode else 1)
            self.merged = not mode
        return self

    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        return y if self.merged else y + x @ self.a.T @ self.b.T


class Restless(nn.Module):
    """Changes everything that a forward pass can change."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCAB, 8, max_norm=0.5)  # rescales rows as they are read
        self.norm, self.merging, self.head = nn.LayerNorm(8), Merging(8), nn.Linear(8, 3)
        nn.init.uniform_(self.norm.weight, 0.5, 1.5)
        self.register_buffer("count", torch.zeros(()))
        self.log, self.notes, self.settings = [1], SimpleNamespace(calls=0, seen={"a"}), {"mode": "sparse"}
        self.fail = False

    def forward(self, input_ids: Tensor) -> Tensor:
        self.count += 1
        self.log.append(2)
        self.notes.calls += 1
        self.notes.seen.add("b")
        self.settings["mode"] = "full"
        self.extra = nn.Linear(2, 2)
        self.head.bias.data = torch.zeros(3)
        self.head.register_forward_hook(lambda *_: None)
        random.random(), np.random.rand(), torch.rand(1)  # noqa: NPY002
        x = self.merging(self.embedding(input_ids))
        if self.fail:
            raise OSError("the pass failed")
        return self.head(self.norm(x))


def picture(model: Restless) -> dict[str, Any]:
    return {
        "tensors": {key: value.clone() for key, value in model.state_dict().items()},
        "modules": [(name, type(module), module.training) for name, module in model.named_modules()],
        "hooks": [len(module._forward_hooks) for module in model.modules()],
        "attributes": (model.merging.merged, list(model.log), vars(model.notes).copy(), dict(model.settings)),
        "seen": set(model.notes.seen),
        "random": (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()),  # noqa: NPY002
    }


def same(one: dict[str, Any], other: dict[str, Any], *, but: tuple[str, ...] = ()) -> bool:
    tensors = zip(one.pop("tensors").items(), other.pop("tensors").items(), strict=True)
    equal = all(a == b and (a in but or torch.equal(x, y)) for (a, x), (b, y) in tensors)
    return equal and one == other


IDS = {"input_ids": torch.arange(VOCAB).view(5, 8)}
CALLS = {
    "evaluating": (lambda m: run(m), ()),
    "calibrate_k": (lambda m: calibrate_k(m, [IDS]), ()),
    "fold_affine": (lambda m: fold_affine(m, inputs=IDS), ("norm.weight", "norm.bias", "head.weight", "head.bias")),
}


def run(model: nn.Module) -> None:
    with evaluating(model):
        model(**IDS)


@pytest.mark.parametrize("fails", [False, True])
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("name", CALLS)
def test_a_call_that_runs_the_model_leaves_no_trace(name: str, training: bool, fails: bool) -> None:
    call, changes = CALLS[name]
    model = Restless().train(training)
    model.norm.train()
    model.fail = fails
    before = picture(model)
    if fails:
        with pytest.raises((OSError, ValueError), match="the pass failed"):
            call(model)
    else:
        call(model)
    assert same(picture(model), before, but=() if fails else changes)


def test_merged_weights_get_gradients_after_a_calibration_in_training_mode() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8), Merging(8)).train()
    calibrate_k(model, [{"input": torch.randn(3, 8)}])
    assert not model[2].merged
    model(torch.randn(3, 8)).sum().backward()
    assert bool(model[2].a.grad.any())


def test_a_fold_leaves_the_sparse_attention_of_big_bird() -> None:
    """A pass over few tokens switches the model to full attention for good."""
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    sparse = {"block_size": 4, "num_random_blocks": 1, "max_position_embeddings": 256}
    model = transformers.BigBirdForMaskedLM(transformers.BigBirdConfig(vocab_size=VOCAB, **sizes, **sparse))
    model.eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name.lower() and name.endswith("weight"):
                parameter.uniform_(0.5, 1.5)
    inputs = {"input_ids": torch.randint(4, VOCAB, (2, 128))}
    with torch.no_grad():
        before = model(**inputs)[0]
        assert fold_affine(model).names("folded")
        after = model(**inputs)[0]
    assert {m.attention_type for m in model.modules() if hasattr(m, "attention_type")} == {"block_sparse"}
    assert float((after - before).abs().max() / before.abs().max()) <= 1e-5


def test_values_are_recovered_by_an_inverse_or_from_a_copy() -> None:
    model = nn.Linear(4, 3).requires_grad_(False)
    state = State(model)
    for factor, rounds in ((torch.tensor([0.3, 7.0, -2.0, 1.0]), True), (torch.tensor([0.0, 1.0, 1.0, 1.0]), False)):
        before, new = model.weight.clone(), model.weight * factor
        state.keep(model.weight, new, lambda x, factor=factor: x / factor)
        model.weight.copy_(new)
        state.restore()
        assert torch.allclose(model.weight, before, rtol=1e-6 if rounds else 0.0, atol=0.0)
