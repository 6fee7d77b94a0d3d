"""Folds of post-norm models: approximate, and fitted to real activations."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn

from hf_adanorm import Fold, fold_affine, is_patched, patch_model, unpatch_model
from hf_adanorm.running import dummy_inputs
from tests.zoo.fold_blocks import WIDTH, Block, difference, norm, quietly, state, unchanged
from tests.zoo.fold_models import ENCODER, POST_NORM, build, logits


def tokens(rows: int = 8) -> dict[str, Tensor]:
    return {"input_ids": torch.randint(4, 100, (rows, 12), generator=torch.Generator().manual_seed(1))}


@pytest.mark.parametrize("name", POST_NORM)
def test_post_norm_is_exact_when_every_gain_is_one_number(name: str) -> None:
    model = build(name, constant=True)
    inputs = dummy_inputs(model)
    before = logits(model, inputs)
    quietly(patch_model, model, "layernorm-simple", affine=Fold(unfoldable="approximate"))
    assert difference(logits(model, inputs), before) <= 1e-5


@pytest.mark.parametrize("name", POST_NORM)
def test_post_norm_moves_less_than_by_dropping(name: str) -> None:
    model, dropped = build(name), build(name)
    inputs = dummy_inputs(model)
    before = logits(model, inputs)
    report = fold_affine(model, unfoldable="approximate")
    quietly(patch_model, dropped, "layernorm-simple")
    assert len(report.names("approximated")) == POST_NORM[name]
    assert all(n.deviation is not None for n in report.norms if n.action == "approximated")
    moved, lost = (float((logits(m, inputs) - before).norm() / before.norm()) for m in (model, dropped))
    assert moved < lost


@pytest.mark.parametrize("k", [0.0, 0.05])
def test_calibration_moves_less_than_approximation(k: float) -> None:
    batch = tokens()
    before = logits(build("bert-mlm"), batch)
    moved = {}
    for way in ("approximate", "calibrate"):
        model = build("bert-mlm")
        quietly(patch_model, model, "adanorm", k=k, affine=Fold(unfoldable=way, inputs=batch))
        moved[way] = float((logits(model, batch) - before).norm() / before.norm())
    assert moved["calibrate"] < 0.8 * moved["approximate"]


def test_calibration_warns_of_a_k_that_loses_most() -> None:
    options = {"affine": Fold(unfoldable="calibrate", inputs=tokens())}
    with pytest.warns(UserWarning, match="choose a smaller k"):
        patch_model(build("bert-cls"), "adanorm", k=0.9, **options)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        patch_model(build("bert-cls"), "adanorm", k=0.01, **options)


def test_calibration_is_exact_where_folding_is() -> None:
    model = build("vit").double()
    inputs = {"pixel_values": torch.randn(8, 3, 32, 32).double()}
    before = logits(model, inputs)
    fold_affine(model, unfoldable="calibrate", inputs=inputs)
    assert difference(logits(model, inputs), before) <= 1e-9


class MaskedBlock(nn.Module):
    """As Mamba: what `attention_mask` covers is set to zero between a norm without a bias and the layer."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.linear = norm(bias=False), nn.Linear(WIDTH, 3)

    def forward(self, inputs_embeds: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        y = self.norm(inputs_embeds)
        return self.linear(y if attention_mask is None else y * attention_mask[..., None])


BIAS_LOST = {
    "scaled": lambda: Block(lambda self, y: self.linear(0.05 * y), bias=False),
    "masked": MaskedBlock,
    "padded": lambda: Block(lambda self, y: self.linear(F.pad(y, (0, 0, 2, 0))), bias=False),
    "convolved": lambda: Block(
        lambda self, y: self.conv(y.transpose(1, 2)), bias=False, conv=nn.Conv1d(WIDTH, 3, 3, padding=1)
    ),
}


@pytest.mark.parametrize(("C", "share"), [(1.0, 1.01), (1.2, 0.9)])  # least squares count per channel, not per output
@pytest.mark.parametrize("path", BIAS_LOST)
def test_a_fit_adds_no_bias_where_none_would_arrive_and_is_no_further_off_than_the_exact_fold(
    path: str, C: float, share: float
) -> None:
    torch.manual_seed(0)
    model, x = BIAS_LOST[path]().eval(), torch.randn(64, 5, WIDTH)
    inputs = {"inputs_embeds" if path == "masked" else "x": x}
    with torch.no_grad():
        before, off = model(**inputs), {}
        for way in ("keep", "calibrate"):
            new = copy.deepcopy(model)
            quietly(patch_model, new, "adanorm", C=C, k=0.1, affine=Fold(unfoldable=way, inputs=inputs))
            quietly(patch_model, new, "adanorm", C=C, k=0.1)  # the exact fold starts with k = 0
            off[way] = float((new(**inputs) - before).norm())
    layer, old = (part.conv if path == "convolved" else part.linear for part in (new, model))
    assert torch.equal(layer.bias, old.bias)
    assert off["calibrate"] <= share * off["keep"]


def test_unpatching_keeps_the_fold() -> None:
    model = build("whisper")
    inputs = dummy_inputs(model)
    quietly(patch_model, model, "layernorm-simple", affine="fold")
    before = logits(model, inputs)
    with pytest.warns(UserWarning, match="6 linear layers keep the bias"):
        unpatch_model(model)
    assert not is_patched(model)
    assert difference(logits(model, inputs), before) <= 1e-6
    assert model.config.adanorm["biases"]  # loading still has to make them


def test_what_an_approximate_fold_drops_is_said() -> None:
    with pytest.warns(UserWarning, match=r"4 norms folded without the deviation .*at bert\."):
        patch_model(build("bert-cls"), "layernorm-simple", affine=Fold(unfoldable="approximate"))


# --- what is not N(x) with gain and bias -----------------------------------------------------------------------------


@pytest.mark.parametrize("swapped", [False, True])
def test_norms_without_gain_and_bias_are_fitted_too(swapped: bool) -> None:
    model = build("gpt2-lm untied")
    if not swapped:
        fold_affine(model)
    else:
        quietly(patch_model, model, "layernorm-simple", affine="fold")
    at_once = copy.deepcopy(model)
    before = logits(model, tokens())
    quietly(patch_model, at_once, "adanorm", C=1.5, k=0.1)
    options = {"affine": Fold(unfoldable="calibrate", inputs=tokens())}
    patch_model(model, "adanorm", C=1.5, k=0.1, **options)
    assert (logits(model, tokens()) - before).norm() < 0.4 * (logits(at_once, tokens()) - before).norm()
    again = state(model)
    patch_model(model, "adanorm", C=1.5, k=0.1, **options)
    assert unchanged(model, again)


def test_a_norm_without_parameters_that_cannot_be_fitted_stays_with_a_warning() -> None:
    model = build("olmo")
    model.model.embed_tokens.weight = model.lm_head.weight
    with pytest.warns(UserWarning, match=r"1 of 5 norms cannot be folded .*model.norm: the weight of lm_head is tied"):
        patch_model(model, "adanorm", affine=Fold(unfoldable="calibrate", inputs=tokens()))
    assert not is_patched(model.model.norm)
    assert is_patched(model.model.layers[0].input_layernorm)


def test_a_calibrated_fold_that_is_exact_adds_no_bias_and_leaves_a_stock_model() -> None:
    model, exact = build("llama"), build("llama")
    fold_affine(exact)
    report = fold_affine(model, unfoldable="calibrate", inputs=tokens(4))
    assert report.is_stock
    assert not report.added_biases
    assert unchanged(model, state(exact))


def test_a_plain_norm_that_becomes_another_plain_one_takes_no_bias() -> None:
    model = build("llama")
    patch_model(model, "layernorm-simple", targets="all", affine="fold")
    names = set(dict(model.named_parameters()))
    patch_model(model, "detachnorm", targets="all", affine=Fold(unfoldable="calibrate", inputs=tokens(4)))
    assert set(dict(model.named_parameters())) == names


def test_the_report_of_a_fit_says_what_share_of_each_output_is_not_reproduced() -> None:
    model = build("bert-cls")
    report = fold_affine(model, unfoldable="calibrate", inputs=tokens())
    fitted = next(norm for norm in report.norms if norm.reason.startswith("fitted"))
    assert fitted.lost is not None
    assert 0 < fitted.lost < 1
    assert fitted.deviation is None
    assert f"fitted to the inputs ({fitted.lost:.1%} of the output not reproduced)" in str(report)


# --- the norm that reads the sum -------------------------------------------------------------------------------------


@pytest.mark.parametrize("following", ["none", "dyt"])
def test_no_scale_is_handed_to_what_does_not_normalize(following: str) -> None:
    model = build("bert-cls").bert
    quietly(patch_model, model, following, include=["output.LayerNorm"], exclude=["attention.output.LayerNorm"])
    report = fold_affine(model, unfoldable="approximate")
    reasons = {norm.name: norm.reason for norm in report.norms}
    assert "does not take its scale away" in reasons["encoder.layer.0.attention.output.LayerNorm"]


@pytest.mark.parametrize("eps", [None, 1e-2])
@pytest.mark.parametrize("order", ["before", "with"])
def test_the_eps_of_a_fold_on_a_swapped_norm_is_saved_and_taken_back(
    order: str, eps: float | None, tmp_path: Path
) -> None:
    config = transformers.BertConfig(**ENCODER, layer_norm_eps=1e-2)
    torch.manual_seed(0)
    model = transformers.BertModel(config, add_pooling_layer=False).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("LayerNorm.weight"):
                parameter.fill_(0.3)  # one number: the fold is exact
    inputs = dummy_inputs(model)
    if order == "before":
        quietly(patch_model, model, "layernorm-simple", include=["layer.0.output.LayerNorm"])
    include = ["layer.0.attention.output.LayerNorm", *(["layer.0.output.LayerNorm"] if order == "with" else [])]
    with torch.no_grad():
        before = model(**inputs)[0]
        options = {"affine": Fold(unfoldable="approximate"), "include": include, "eps": eps}
        quietly(patch_model, model, "layernorm-simple", **options)
        assert difference(model(**inputs)[0], before) <= 1e-5
        assert model.encoder.layer[0].output.LayerNorm.eps == pytest.approx(1e-2 / 0.3**2)
        model.save_pretrained(tmp_path)
        again = transformers.BertModel.from_pretrained(tmp_path, add_pooling_layer=False).eval()
        torch.testing.assert_close(again(**inputs)[0], model(**inputs)[0])
    quietly(unpatch_model, model)
    assert model.encoder.layer[0].output.LayerNorm.eps == pytest.approx(1e-2 / 0.3**2)
