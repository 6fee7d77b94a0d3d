"""Which norms are not folded, each with a reason, and what other inputs than the probe's would show."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hf_adanorm import fold_affine
from tests.zoo.fold_blocks import WIDTH, Block, difference, fold_block, norm
from tests.zoo.fold_models import build

# --- what is refused, and why ----------------------------------------------------------------------------------------


def tied() -> Block:
    block = Block(lambda self, y: self.head(y), head=nn.Linear(WIDTH, 4), embedding=nn.Embedding(4, WIDTH))
    block.head.weight = block.embedding.weight
    return block


def shared() -> Block:
    block = Block(lambda self, y: self.linear(y) + self.linear(self.second(self.x)), second=norm())
    block.x = torch.randn(2, 5, WIDTH)
    return block


def weight_normed() -> Block:
    block = Block(lambda self, y: self.linear(y))
    nn.utils.parametrizations.weight_norm(block.linear)
    return block


def quantized() -> Block:
    block = Block(lambda self, y: self.linear(y))
    block.linear = torch.ao.nn.quantized.dynamic.Linear(WIDTH, 3)
    return block


class Experts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.ModuleList(nn.Linear(WIDTH, 3) for _ in range(2))

    def forward(self, y: Tensor) -> Tensor:
        return self.experts[0](y)


REFUSED = {
    "added to the residual stream": lambda: Block(lambda self, y: y + self.linear(y).sum()),
    "sigmoid": lambda: Block(lambda self, y: self.linear(y.sigmoid())),
    "mm": lambda: Block(lambda self, y: y @ self.linear.weight.T),
    "another norm": lambda: Block(lambda self, y: self.linear(self.second(y)), second=norm()),
    "through an alias": lambda: Block(lambda self, y: self.linear(y) + torch.from_numpy(y.numpy()).sum()),
    "alpha_dropout": lambda: Block(lambda self, y: self.linear(self.drop(y)), drop=nn.AlphaDropout(0.5)),
    "the weight of head is tied to embedding": tied,
    "the weight of linear is also read by sum": lambda: Block(
        lambda self, y: self.linear(y) + self.linear.weight.sum()
    ),
    "linear also reads the norm second": shared,
    "linear also reads something that is not this norm's output": lambda: Block(
        lambda self, y: self.linear(y) + self.linear(torch.ones(2, 5, WIDTH))
    ),
    "linear is parametrized": weight_normed,
    "read by": quantized,
    "it is the model's output (output)": lambda: Block(lambda self, y: y),
    "moe.experts.1 did not run": lambda: Block(lambda self, y: self.moe(y), moe=Experts()),
    "other did not run": lambda: Block(lambda self, y: self.linear(y), other=nn.Linear(WIDTH, 2)),
}


@pytest.mark.parametrize("reason", REFUSED)
@torch.no_grad()
def test_what_cannot_be_folded_is_kept_with_the_reason(reason: str) -> None:
    result = fold_block(REFUSED[reason]())
    assert result.action == "kept"
    assert reason in result.reason


BIAS_LOST = {
    "pads with zeros": lambda bias: Block(
        lambda self, y: self.conv(y.transpose(1, 2)), bias=bias, conv=nn.Conv1d(WIDTH, 3, 3, padding=1)
    ),
    "dropout in training": lambda bias: Block(
        lambda self, y: self.linear(self.dropout(y)), bias=bias, dropout=nn.Dropout(0.1)
    ),
}


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("reason", BIAS_LOST)
def test_what_loses_a_bias_is_refused_if_there_is_one(reason: str, bias: bool) -> None:
    result = fold_block(BIAS_LOST[reason](bias))
    assert result.action == ("kept" if bias else "folded")
    assert not bias or reason in result.reason


def test_a_layer_with_an_adapter_is_refused() -> None:
    peft = pytest.importorskip("peft")
    block = Block(lambda self, y: self.linear(y))
    wrapped = peft.get_peft_model(block, peft.LoraConfig(target_modules=["linear"], r=2))
    report = fold_affine(wrapped.eval(), inputs={"x": torch.randn(2, 5, WIDTH)})
    assert "adapter" in report.norms[0].reason


def test_a_norm_that_does_not_run_is_kept() -> None:
    block = Block(lambda self, y: self.linear(y), second=norm())
    report = fold_affine(block.eval(), inputs={"x": torch.randn(2, 5, WIDTH)})
    assert {n.name: n.action for n in report.norms} == {"norm": "folded", "second": "kept"}


# --- what other inputs would show ------------------------------------------------------------------------------------


def test_padding_by_nothing_and_a_mask_that_masks_nothing_are_not_trusted() -> None:
    pads = Block(lambda self, y: self.linear(F.pad(y, (0, 0, 0, -y.shape[1] % 5))))
    assert "masked or padded" in fold_block(pads).reason
    fills = Block(lambda self, y: self.linear(y.masked_fill(~self.mask[..., None], 0.0)))
    fills.mask = torch.ones(2, 5, dtype=torch.bool)
    assert "masked or padded" in fold_block(fills).reason
    assert fold_block(Block(pads.compute, bias=False)).action == "folded"  # nothing arrives there that could be lost


@pytest.mark.parametrize("start", [0, 20])
def test_padding_of_sound_stays_out_of_the_convolutions_of_a_conformer(start: int) -> None:
    model = build("w2v-bert")
    inputs = {"input_features": torch.randn(2, 40, 16), "attention_mask": torch.ones(2, 40, dtype=torch.int64)}
    inputs["attention_mask"][0, start : start + 20] = 0
    real = inputs["attention_mask"].bool()
    with torch.no_grad():
        before = model(**inputs)[0][real]
        reasons = {norm.name: norm.reason for norm in fold_affine(model).norms}
        assert difference(model(**inputs)[0][real], before) <= 1e-5
    assert "padded, masked" in reasons["encoder.layers.0.conv_module.layer_norm"]


class Masked(nn.Module):
    """Fills with zeros what `attention_mask` says, before a layer that reads the norm."""

    def __init__(self, least: int) -> None:
        super().__init__()
        self.norm, self.linear, self.least = norm(), nn.Linear(WIDTH, 3), least

    def forward(self, inputs_embeds: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        y = self.norm(inputs_embeds)
        if attention_mask is not None:
            if len(attention_mask) < self.least:
                raise ValueError("too few rows")
            y = y.masked_fill(attention_mask[..., None] == 0, 0.0)
        return self.linear(y)


@pytest.mark.parametrize(("least", "reason"), [(1, "padded, masked or scaled"), (9, "what attention_mask would mask")])
def test_a_mask_that_the_inputs_lack_is_tried_and_not_trusted_where_it_does_not_run(least: int, reason: str) -> None:
    assert reason in fold_block(Masked(least), inputs={"inputs_embeds": torch.randn(2, 6, WIDTH)}).reason
