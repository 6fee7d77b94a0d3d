"""Folding gains and biases into the layers that read the norm: exact where done, refused with a reason elsewhere."""

from __future__ import annotations

import subprocess
import sys
import textwrap
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from hf_adanorm import fold_affine, is_patched, patch_model, set_fade, unpatch_model
from hf_adanorm.folding.consumers import num_inputs, watch_consumers
from hf_adanorm.folding.fold import fold_norms
from hf_adanorm.running import dummy_inputs, real_rows
from hf_adanorm.saving import install
from hf_adanorm.swapping import all_or_nothing
from tests.zoo.fold_models import POST_NORM, build, logits

transformers.logging.set_verbosity_error()
WIDTH = 8


def difference(new: Tensor, old: Tensor) -> float:
    return float((new - old).abs().max() / old.abs().max())


def quietly(function: Any, *args: Any, **kwargs: Any) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return function(*args, **kwargs)


def norm(width: int = WIDTH, bias: bool = True) -> nn.LayerNorm:
    """A LayerNorm with a gain and a bias that show."""
    module = nn.LayerNorm(width)
    with torch.no_grad():
        module.weight.copy_(torch.linspace(0.5, 1.5, width))
        module.bias.copy_(torch.linspace(-0.5, 0.5, width) if bias else torch.zeros(width))
    return module


class Block(nn.Module):
    """`compute(self, norm(x))` with a norm, a linear layer and whatever else is given as `self.NAME`."""

    def __init__(self, compute: Any, *, bias: bool = True, **modules: nn.Module) -> None:
        super().__init__()
        self.norm = norm(bias=bias)
        if "linear" in compute.__code__.co_names:  # one that does not run might read the norm on other inputs
            self.linear = nn.Linear(WIDTH, 3)
        for name, module in modules.items():
            setattr(self, name, module)
        self.compute = compute

    def forward(self, x: Tensor) -> Any:
        return self.compute(self, self.norm(x))


def fold_block(block: nn.Module, **options: Any) -> Any:
    options = {"fold_inputs": {"x": torch.randn(2, 5, WIDTH)}, **options}
    return fold_affine(block.eval(), **options).norms[0]


# --- what folds, exactly ---------------------------------------------------------------------------------------------

# name -> (norms, folded); the rest stay, each with a reason
EXACT = {
    "gpt2-lm": (5, 4),
    "gpt2-lm untied": (5, 5),
    "opt": (5, 4),
    "gpt_neox": (5, 5),
    "gptj": (3, 3),
    "vit": (5, 5),
    "clip": (11, 10),
    "whisper": (12, 11),
    "dinov2": (5, 5),
    "mbart": (14, 11),
    "pegasus": (12, 11),
    "m2m100": (12, 11),
    "swin": (7, 4),  # two before windows that may be padded
    "convnext": (9, 8),
    "segformer": (19, 12),
    "t5": (12, 11),
    "llama": (5, 5),
    "esm": (6, 5),
}


@pytest.mark.parametrize("name", EXACT)
def test_task_outputs_stay_what_they_were(name: str) -> None:
    model = build(name)
    inputs = dummy_inputs(model)
    before = logits(model, inputs)
    report = fold_affine(model)
    assert (len(report.norms), len(report.names("folded"))) == EXACT[name]
    assert all(norm.reason for norm in report.norms if norm.action == "kept")
    assert difference(logits(model, inputs), before) <= 1e-5


@pytest.mark.parametrize("name", ["gpt2-lm untied", "vit", "whisper"])
def test_patching_by_fold_gives_the_same_function_at_k_0(name: str) -> None:
    simple, ramped = build(name), build(name)
    inputs = dummy_inputs(simple)
    before = logits(simple, inputs)
    quietly(patch_model, simple, "layernorm-simple", affine="fold")
    quietly(patch_model, ramped, "adanorm", C=1.3, k=0.07, affine="fold")
    assert difference(logits(simple, inputs), before) <= 1e-5
    assert difference(logits(ramped, inputs), before) <= 1e-5
    set_fade(ramped, 1.0)
    assert difference(logits(ramped, inputs), before) > 1e-2  # k and C have arrived


def first_layer(vit: nn.Module) -> Any:
    """Under whichever name this version of transformers gives it."""
    return next(module for name, module in vit.named_modules() if name.endswith((".layers.0", ".layer.0")))


def test_fold_uses_float64_and_rounds_once() -> None:
    model = build("vit").bfloat16()
    layer = first_layer(model)
    wide = next(m for m in layer.modules() if isinstance(m, nn.Linear) and m.out_features > m.in_features)
    gain, bias = layer.layernorm_after.weight.double(), layer.layernorm_after.bias.double()
    weight, old = wide.weight.double(), wide.bias.double()
    fold_affine(model)
    assert torch.equal(wide.weight, (weight * gain).bfloat16())
    assert torch.equal(wide.bias, (old + weight @ bias).bfloat16())


@pytest.mark.parametrize("groups", [1, 2, WIDTH])
def test_convolutions_fold_by_input_channel(groups: int) -> None:
    conv = nn.Conv1d(WIDTH, WIDTH, 3, groups=groups, bias=False)
    block = Block(lambda self, y: self.conv(y.transpose(1, 2)), conv=conv).eval()
    x = torch.randn(2, 5, WIDTH)
    before = block(x)
    assert fold_block(block).action == "folded"
    assert conv.bias is not None
    torch.testing.assert_close(block(x), before)


def test_columns_of_other_tensors_are_left_alone() -> None:
    block = Block(
        lambda self, y: self.wide(torch.cat([y, torch.ones(2, 5, 2)], -1)), wide=nn.Linear(WIDTH + 2, 3)
    ).eval()
    last = block.wide.weight[:, WIDTH:].clone()
    x = torch.randn(2, 5, WIDTH)
    before = block(x)
    assert fold_block(block).action == "folded"
    assert torch.equal(block.wide.weight[:, WIDTH:], last)
    torch.testing.assert_close(block(x), before)


def test_two_norms_fold_into_one_layer_that_reads_them_side_by_side() -> None:
    block = Block(
        lambda self, y: self.wide(torch.cat([y, self.second(y)], -1)), second=nn.Identity(), wide=nn.Linear(16, 3)
    )
    block.compute = lambda self, y: self.wide(torch.cat([y, self.second(self.x)], -1))
    block.second, block.x = norm(), torch.randn(2, 5, WIDTH)
    x = torch.randn(2, 5, WIDTH)
    before = block.eval()(x)
    report = fold_affine(block, fold_inputs={"x": x})
    assert len(report.names("folded")) == 2
    torch.testing.assert_close(block(x), before)


def test_a_masked_mean_over_tokens_folds_if_the_inputs_show_padding() -> None:
    def pool(self: Any, y: Tensor) -> Tensor:
        mask = self.mask.unsqueeze(-1).expand(y.shape)
        return self.linear((y * mask).sum(1) / mask.sum(1))

    block = Block(pool).eval()
    block.mask = torch.ones(2, 5)
    assert "masked or padded" in fold_block(block).reason
    block.mask[1, 3:] = 0.0
    x = torch.randn(2, 5, WIDTH)
    before = block(x)
    assert fold_block(block).action == "folded"
    torch.testing.assert_close(block(x), before)


_MOVES = {
    "transpose": lambda y: y.transpose(0, 1),
    "slice": lambda y: y[:, 1:] if y.shape[1] > 1 else y,
    "select and unsqueeze": lambda y: y[:, 0].unsqueeze(1),
    "gather": lambda y: y[torch.arange(y.shape[0]).flip(0)],
    "flatten": lambda y: y.reshape(-1, 1, y.shape[-1]),
    "roll": lambda y: y.roll(1, 1),
    "cat with itself": lambda y: torch.cat([y, y], 1),
    "expand": lambda y: y[:1].expand(3, -1, -1),
    "mean": lambda y: y.mean(1, keepdim=True),
    "merge": lambda y: torch.cat([y[:, :1], y[:, -1:]], -1) if y.shape[-1] == WIDTH else y,
    "pad": lambda y: torch.nn.functional.pad(y, (0, 0, 1, 0)),
    "halve": lambda y: y * 0.5,
    "flip channels": lambda y: y.flip(-1),
    "gelu": torch.nn.functional.gelu,
    "square": lambda y: y * y,
    "round": lambda y: y.long().double(),
    "floor": lambda y: torch.div(y, 0.5, rounding_mode="floor"),
}


@settings(max_examples=40)
@given(moves=st.lists(st.sampled_from(sorted(_MOVES)), max_size=4), bias=st.booleans())
def test_whatever_is_folded_is_the_same_function(moves: list[str], bias: bool) -> None:
    """Any chain of operations between norm and layer: folded exactly, or refused; never folded wrongly."""

    def compute(self: Any, y: Tensor) -> Tensor:
        for move in moves:
            y = _MOVES[move](y)
        return self.wide(y)

    width = 2 * WIDTH if "merge" in moves else WIDTH
    block = Block(compute, bias=bias, wide=nn.Linear(width, 3)).double().eval()
    x, other = torch.randn(2, 5, WIDTH).double(), torch.randn(4, 6, WIDTH).double()
    before = block(x), block(other)
    folded = fold_block(block, fold_inputs={"x": x}).action == "folded"
    for old, value in zip(before, (x, other), strict=True):
        torch.testing.assert_close(block(value), old, rtol=1e-9, atol=1e-9)
    spoiled = bool({"gelu", "square", "round", "floor"} & set(moves)) or (bias and bool({"pad", "halve"} & set(moves)))
    assert folded or spoiled


# --- what is refused, and why ----------------------------------------------------------------------------------------


def test_residual_and_functional_uses_are_refused() -> None:
    assert "added to the residual stream" in fold_block(Block(lambda self, y: y + self.linear(y).sum())).reason
    assert "sigmoid" in fold_block(Block(lambda self, y: self.linear(y.sigmoid()))).reason
    assert "mm" in fold_block(Block(lambda self, y: y @ self.linear.weight.T)).reason
    assert "another norm" in fold_block(Block(lambda self, y: self.linear(self.second(y)), second=norm())).reason


def test_a_view_that_torch_does_not_report_is_refused() -> None:
    block = Block(lambda self, y: self.linear(y) + torch.from_numpy(y.numpy()).sum())
    with torch.no_grad():
        assert "through an alias" in fold_block(block).reason


def test_a_tied_weight_is_refused() -> None:
    block = Block(lambda self, y: self.head(y), head=nn.Linear(WIDTH, 4), embedding=nn.Embedding(4, WIDTH))
    block.head.weight = block.embedding.weight
    assert fold_block(block).reason == "the weight of head is tied to embedding"


def test_a_weight_that_is_read_elsewhere_is_refused() -> None:
    block = Block(lambda self, y: self.linear(y) + self.linear.weight.sum())
    assert "the weight of linear is also read by sum" in fold_block(block).reason


def test_a_layer_shared_by_two_norms_is_refused() -> None:
    block = Block(lambda self, y: self.linear(y) + self.linear(self.second(self.x)), second=norm())
    block.x = torch.randn(2, 5, WIDTH)
    assert fold_block(block).reason == "linear also reads the norm second"


def test_a_layer_that_reads_something_else_too_is_refused() -> None:
    block = Block(lambda self, y: self.linear(y) + self.linear(torch.ones(2, 5, WIDTH)))
    assert fold_block(block).reason == "linear also reads something that is not this norm's output"


@pytest.mark.parametrize("bias", [True, False])
def test_a_padded_convolution_is_refused_when_the_bias_is_not_zero(bias: bool) -> None:
    conv = nn.Conv1d(WIDTH, 3, 3, padding=1)
    block = Block(lambda self, y: self.conv(y.transpose(1, 2)), bias=bias, conv=conv)
    assert fold_block(block).action == ("kept" if bias else "folded")


@pytest.mark.parametrize("bias", [True, False])
def test_dropout_before_the_layer_is_refused_when_the_bias_is_not_zero(bias: bool) -> None:
    block = Block(lambda self, y: self.linear(self.dropout(y)), bias=bias, dropout=nn.Dropout(0.1))
    result = fold_block(block)
    assert result.action == ("kept" if bias else "folded")
    assert not bias or "dropout in training" in result.reason


def test_a_parametrized_layer_is_refused() -> None:
    block = Block(lambda self, y: self.linear(y))
    nn.utils.parametrizations.weight_norm(block.linear)
    assert "parametrized" in fold_block(block).reason


def test_a_layer_with_an_adapter_is_refused() -> None:
    peft = pytest.importorskip("peft")
    block = Block(lambda self, y: self.linear(y))
    wrapped = peft.get_peft_model(block, peft.LoraConfig(target_modules=["linear"], r=2))
    report = fold_affine(wrapped.eval(), fold_inputs={"x": torch.randn(2, 5, WIDTH)})
    assert "adapter" in report.norms[0].reason


def test_a_quantised_layer_is_refused() -> None:
    block = Block(lambda self, y: self.linear(y))
    block.linear = torch.ao.nn.quantized.dynamic.Linear(WIDTH, 3)
    assert fold_block(block).action == "kept"


def test_a_final_norm_without_a_head_is_refused() -> None:
    assert fold_block(Block(lambda self, y: y)).reason == "it is the model's output (output)"
    report = fold_affine(
        transformers.GPT2Model(transformers.GPT2Config(n_embd=32, n_layer=1, n_head=2, n_positions=64))
    )
    assert report.names("kept") == []  # gain 1, bias 0: nothing to do
    model = build("gpt2-lm").transformer
    report = fold_affine(model)
    assert {n.name: n.reason for n in report.norms}["ln_f"] == "it is the model's output (last_hidden_state)"


def test_layers_that_did_not_run_may_read_it_too() -> None:
    class Experts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.experts = nn.ModuleList(nn.Linear(WIDTH, 3) for _ in range(2))

        def forward(self, y: Tensor) -> Tensor:
            return self.experts[0](y)

    assert "experts.1 did not run" in fold_block(Block(lambda self, y: self.moe(y), moe=Experts())).reason


def test_a_norm_that_does_not_run_is_kept() -> None:
    block = Block(lambda self, y: self.linear(y), second=norm())
    report = fold_affine(block.eval(), fold_inputs={"x": torch.randn(2, 5, WIDTH)})
    assert {n.name: n.action for n in report.norms} == {"norm": "folded", "second": "kept"}


# --- all or nothing --------------------------------------------------------------------------------------------------


def state(model: nn.Module) -> dict[str, Tensor]:
    return {key: value.clone() for key, value in model.state_dict().items()}


def unchanged(model: nn.Module, before: dict[str, Tensor]) -> bool:
    after = model.state_dict()
    return after.keys() == before.keys() and all(torch.equal(after[key], before[key]) for key in before)


def test_folding_twice_changes_nothing() -> None:
    model = build("whisper")
    fold_affine(model)
    before = state(model)
    report = fold_affine(model)
    assert len(report.names("nothing to fold")) == 11
    assert unchanged(model, before)


def test_a_difference_above_the_tolerance_undoes_everything() -> None:
    model = build("whisper")
    before, spec = state(model), getattr(model.config, "adanorm", None)
    with pytest.raises(RuntimeError, match="above the tolerance"):
        fold_affine(model, tolerance=1e-12)
    assert unchanged(model, before)
    assert getattr(model.config, "adanorm", None) == spec


def test_an_undone_approximation_restores_eps() -> None:
    model = build("bert-cls", constant=True)
    before, eps = state(model), [m.eps for m in model.modules() if isinstance(m, nn.LayerNorm)]
    with pytest.raises(RuntimeError, match="above the tolerance"):
        fold_affine(model, on_unfoldable="approximate", tolerance=1e-12)
    assert unchanged(model, before)
    assert [m.eps for m in model.modules() if isinstance(m, nn.LayerNorm)] == eps


def test_overflow_in_half_precision_undoes_everything() -> None:
    block = Block(lambda self, y: self.linear(y)).half()
    with torch.no_grad():
        block.linear.weight.fill_(60000.0)
    before = state(block)
    with pytest.raises(RuntimeError, match="overflows"):
        fold_block(block, fold_inputs={"x": torch.randn(2, 5, WIDTH).half()})
    assert unchanged(block, before)


def test_raise_stops_before_anything_changes() -> None:
    model = build("gpt2-lm")
    before = state(model)
    with pytest.raises(ValueError, match=r"1 of 5 norms cannot be folded: transformer.ln_f.*tied"):
        fold_affine(model, on_unfoldable="raise")
    with pytest.raises(ValueError, match="cannot be folded"):
        patch_model(model, affine="fold", on_unfoldable="raise")
    assert unchanged(model, before)
    assert not is_patched(model)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"norm": "none", "affine": "fold"}, 'does not go with norm="none"'),
        ({"affine": "fold", "on_unfoldable": "calibrate"}, "pass fold_inputs"),
        ({"affine": "fold", "on_unfoldable": "guess"}, "on_unfoldable"),
        ({"affine": "melt"}, "affine"),
        ({"on_unfoldable": "calibrate"}, "on_unfoldable='calibrate' goes with affine=\"fold\", got affine='drop'"),
        ({"affine": "fade", "fold_inputs": {}}, "fold_inputs goes with affine"),
    ],
)
def test_contradictions_raise_before_anything_changes(options: dict[str, Any], message: str) -> None:
    model = build("bert-cls")
    before = state(model)
    with pytest.raises(ValueError, match=message):
        patch_model(model, **options)
    assert unchanged(model, before)


def test_the_meta_device_and_unknown_inputs_are_refused() -> None:
    with torch.device("meta"):
        model = transformers.BertModel(transformers.BertConfig(num_hidden_layers=1))
    with pytest.raises(ValueError, match="needs the weights"):
        fold_affine(model)
    with pytest.raises(ValueError, match="fold_inputs="):
        fold_affine(Block(lambda self, y: self.linear(y)))


def test_training_flags_hooks_and_random_state_are_left_alone() -> None:
    model = build("vit").train()
    first_layer(model).eval()
    flags = [module.training for module in model.modules()]
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    fold_affine(model)
    assert [module.training for module in model.modules()] == flags
    assert torch.equal(torch.rand(1), expected)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


# --- post-norm: approximate and calibrate ----------------------------------------------------------------------------


@pytest.mark.parametrize("name", POST_NORM)
def test_post_norm_is_exact_when_every_gain_is_one_number(name: str) -> None:
    model = build(name, constant=True)
    inputs = dummy_inputs(model)
    before = logits(model, inputs)
    quietly(patch_model, model, "layernorm-simple", affine="fold", on_unfoldable="approximate")
    assert difference(logits(model, inputs), before) <= 1e-5


@pytest.mark.parametrize("name", POST_NORM)
def test_post_norm_moves_less_than_by_dropping(name: str) -> None:
    model, dropped = build(name), build(name)
    inputs = dummy_inputs(model)
    before = logits(model, inputs)
    report = fold_affine(model, on_unfoldable="approximate")
    quietly(patch_model, dropped, "layernorm-simple")
    assert len(report.names("approximated")) == POST_NORM[name]
    assert all(n.deviation is not None for n in report.norms if n.action == "approximated")
    moved, lost = (float((logits(m, inputs) - before).norm() / before.norm()) for m in (model, dropped))
    assert moved < lost


@pytest.mark.parametrize("k", [0.0, 0.05])
def test_calibration_moves_less_than_approximation(k: float) -> None:
    batch = dummy_inputs(build("bert-mlm"))
    batch["input_ids"] = torch.randint(4, 100, (8, 12), generator=torch.Generator().manual_seed(1))
    batch["attention_mask"] = torch.ones_like(batch["input_ids"])
    before = logits(build("bert-mlm"), batch)
    moved = {}
    for way in ("approximate", "calibrate"):
        model = build("bert-mlm")
        quietly(patch_model, model, "adanorm", k=k, affine="fold", on_unfoldable=way, fold_inputs=batch, ramp=False)
        moved[way] = float((logits(model, batch) - before).norm() / before.norm())
    assert moved["calibrate"] < 0.8 * moved["approximate"]


def test_calibration_warns_of_a_k_that_loses_most() -> None:
    batch = {"input_ids": torch.randint(4, 100, (8, 12), generator=torch.Generator().manual_seed(1))}
    options = {"affine": "fold", "on_unfoldable": "calibrate", "fold_inputs": batch}
    with pytest.warns(UserWarning, match="choose a smaller k"):
        patch_model(build("bert-cls"), "adanorm", k=0.9, **options)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        patch_model(build("bert-cls"), "adanorm", k=0.01, **options)


def test_calibration_is_exact_where_folding_is() -> None:
    model = build("vit").double()
    inputs = {"pixel_values": torch.randn(8, 3, 32, 32).double()}
    before = logits(model, inputs)
    fold_affine(model, on_unfoldable="calibrate", fold_inputs=inputs)
    assert difference(logits(model, inputs), before) <= 1e-9


def test_what_cannot_be_folded_is_kept_or_faded() -> None:
    kept, faded = build("gpt2-lm"), build("gpt2-lm")
    inputs = dummy_inputs(kept)
    before = logits(kept, inputs)
    with pytest.warns(UserWarning, match="1 of 5 norms cannot be folded and stay as they are"):
        patch_model(kept, "adanorm", affine="fold")
    quietly(patch_model, faded, "adanorm", affine="fold", on_unfoldable="fade")
    assert type(kept.transformer.ln_f) is nn.LayerNorm
    assert [m.fade for m in faded.modules() if hasattr(m, "fade")] == [(), (), (), (), ("gain", "bias")]
    for model in (kept, faded):
        assert difference(logits(model, inputs), before) <= 1e-5


def test_no_ramp_warns() -> None:
    with pytest.warns(UserWarning, match="ramp=False"):
        patch_model(build("vit"), "adanorm", affine="fold", ramp=False)


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


# --- saving ----------------------------------------------------------------------------------------------------------

_RELOAD = """
    import sys, torch, transformers, hf_adanorm
    from pathlib import Path
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(1)
    for folder in map(Path, sys.argv[1:]):
        saved = torch.load(folder / "expected.pt", weights_only=True)
        cls = getattr(transformers, (folder / "class.txt").read_text())
        model, info = cls.from_pretrained(folder, output_loading_info=True)
        assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys")), (folder, info)
        with torch.no_grad():
            output = model.eval()(**saved["inputs"])
        result = output["logits"] if "logits" in output else output[0]
        assert torch.equal(result, saved["logits"]), folder
        model.save_pretrained(folder / "again")
        again = cls.from_pretrained(folder / "again").eval()
        with torch.no_grad():
            assert torch.equal(again(**saved["inputs"])[0], output[0]), folder
        print("same", folder.name)
"""

SAVED = {
    "gpt2": ("gpt2-lm untied", {"norm": "adanorm", "C": 1.3, "k": 0.07, "affine": "fold"}),
    "whisper": ("whisper", {"norm": "layernorm-simple", "affine": "fold"}),
    "bert": ("bert-cls", {"norm": "adanorm", "affine": "fold", "on_unfoldable": "approximate"}),
    "fade": ("bert-mlm", {"norm": "adanorm", "C": 1.3, "affine": "fold", "on_unfoldable": "fade"}),
    "swin": ("swin", {"norm": "layernorm-simple", "affine": "fold"}),
}


def test_folded_models_reload_through_stock_calls_in_a_fresh_process(tmp_path: Path) -> None:
    folders = []
    for name, (architecture, options) in SAVED.items():
        model = build(architecture)
        inputs = dummy_inputs(model)
        quietly(patch_model, model, **options)
        if name in ("gpt2", "fade"):
            set_fade(model, 0.4)
        folders.append(tmp_path / name)
        model.save_pretrained(folders[-1])
        torch.save({"inputs": inputs, "logits": logits(model, inputs)}, folders[-1] / "expected.pt")
        (folders[-1] / "class.txt").write_text(type(model).__name__)
    base = build("bert-cls").bert  # its last norm is the output: kept, with another eps
    inputs = dummy_inputs(base)
    quietly(patch_model, base, "layernorm-simple", affine="fold", on_unfoldable="approximate")
    assert list(base.config.adanorm["eps"]) == ["encoder.layer.1.output.LayerNorm"]
    folders.append(tmp_path / "base")
    base.save_pretrained(folders[-1])
    with torch.no_grad():
        torch.save({"inputs": inputs, "logits": base(**inputs)[0]}, folders[-1] / "expected.pt")
    (folders[-1] / "class.txt").write_text("BertModel")
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(_RELOAD), *map(str, folders)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("same") == len(SAVED) + 1


def test_another_head_gets_the_biases_that_it_has(tmp_path: Path) -> None:
    model = build("gpt2-lm untied")
    fold_affine(model)
    assert model.config.adanorm["biases"] == ["^lm_head"]
    model.save_pretrained(tmp_path)
    again = transformers.GPT2LMHeadModel.from_pretrained(tmp_path)
    assert torch.equal(again.lm_head.bias, model.lm_head.bias)
    assert not hasattr(transformers.GPT2Model.from_pretrained(tmp_path), "lm_head")


def test_a_bias_that_was_added_cannot_be_lost_by_loading_without_the_package(tmp_path: Path) -> None:
    model = build("gpt2-lm untied")
    fold_affine(model)
    assert model.config.adanorm["groups"] == [{"norm": "layernorm-simple", "modules": ["ln_f"]}]
    model.save_pretrained(tmp_path)
    install.uninstall()
    try:
        with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):
            transformers.GPT2LMHeadModel.from_pretrained(tmp_path)
    finally:
        install.install()


def reloaded(model: nn.Module, folder: Path) -> nn.Module:
    model.save_pretrained(folder)
    return type(model).from_pretrained(folder).eval()


@pytest.mark.parametrize("name", ["gpt_neox", "gpt2-lm untied", "llama"])
def test_resized_embeddings_lose_no_bias_of_a_fold(name: str, tmp_path: Path) -> None:
    model = build(name)
    quietly(patch_model, model, "adanorm", affine="fold", targets="all")
    model.resize_token_embeddings(64)  # puts a new head in place of the one that got a bias
    inputs = dummy_inputs(model)
    assert torch.equal(logits(reloaded(model, tmp_path), inputs), logits(model, inputs))


def test_layers_quantised_to_8_bits_and_back_lose_no_bias_of_a_fold(tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    model = build("stablelm")  # none of its layers but one has a bias of its own
    quietly(patch_model, model, "layernorm-simple", affine="fold")
    model.save_pretrained(tmp_path / "folded")
    how = transformers.BitsAndBytesConfig(load_in_8bit=True)
    model = type(model).from_pretrained(tmp_path / "folded", quantization_config=how).eval()
    inputs = {"input_ids": torch.arange(4, 12)[None]}
    assert torch.equal(logits(reloaded(model, tmp_path / "quantised"), inputs), logits(model, inputs))
    model = model.dequantize(torch.float32)
    assert torch.equal(logits(reloaded(model, tmp_path / "whole"), inputs), logits(model, inputs))


def test_the_eps_of_a_fold_outlives_the_norm_that_it_was_adjusted_on(tmp_path: Path) -> None:
    model = build("bert-cls").bert
    inputs = dummy_inputs(model)
    quietly(patch_model, model, "layernorm-simple", affine="fold", on_unfoldable="approximate")
    last = model.encoder.layer[1].output
    other = nn.LayerNorm(last.LayerNorm.weight.shape, last.LayerNorm.eps)
    other.load_state_dict(last.LayerNorm.state_dict())
    last.LayerNorm = other
    again = reloaded(model, tmp_path)
    assert again.encoder.layer[1].output.LayerNorm.eps == other.eps != model.config.layer_norm_eps
    with torch.no_grad():
        assert torch.equal(again(**inputs)[0], model(**inputs)[0])


def test_a_fold_that_changed_values_only_needs_no_spec() -> None:
    model = build("vit")
    fold_affine(model)
    assert not is_patched(model)
    assert not hasattr(model.config, "adanorm")


def test_a_spec_that_gives_a_bias_to_something_else_is_refused() -> None:
    config = transformers.GPT2Config(n_embd=32, n_layer=1, n_head=2, n_positions=64)
    config.adanorm = {"format": 1, "version": "0.1.0", "groups": [], "biases": ["wte"]}
    with pytest.raises(ValueError, match="no linear layer"):
        transformers.GPT2Model(config)


# --- the report ------------------------------------------------------------------------------------------------------


def test_the_report_says_what_became_of_each_norm() -> None:
    report = fold_affine(build("clip"))
    text, page = str(report), report._repr_html_()
    assert "vision_model.pre_layrnorm" in text
    assert "10 folded, 1 kept" in text
    assert "2 biases added" in text
    assert "text_model_output.last_hidden_state" in text  # it changes, beside logits that do not
    assert page.count("<tr>") == 12


def test_watching_reports_columns_in_the_order_of_the_input() -> None:
    block = Block(lambda self, y: self.linear(y.flip(-1))).eval()
    watched = watch_consumers(block, {"norm": ((WIDTH,), False)}, {"x": torch.randn(2, 5, WIDTH)})
    (use,) = watched.uses["norm"]
    assert use.columns == tuple(reversed(range(WIDTH)))  # type: ignore[union-attr]
    assert num_inputs(block.linear) == WIDTH


def test_only_the_named_norms_are_folded() -> None:
    model = build("vit")
    with all_or_nothing(model) as change:
        report = fold_norms(change, ["vit.layernorm"])
    assert report.names("folded") == ["vit.layernorm"]
    assert bool((model.vit.layernorm.weight == 1).all())
    assert not bool((first_layer(model).layernorm_before.weight == 1).all())


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
    assert reason in fold_block(Masked(least), fold_inputs={"inputs_embeds": torch.randn(2, 6, WIDTH)}).reason


def test_what_reads_a_norm_in_training_only_keeps_it() -> None:
    class Auxiliary(Block):
        def forward(self, x: Tensor) -> Any:
            y = self.norm(self.batch(x))
            return (self.linear(y), y.square().mean()) if self.training else (self.linear(y),)

    block = Auxiliary(lambda self, y: self.linear(y), batch=nn.BatchNorm1d(5))
    before = state(block)
    assert "in training mode also read by pow" in fold_block(block).reason
    assert unchanged(block, before)  # the statistics of the batch norm, too


@pytest.mark.parametrize("name", ["videomae", "vilt"])
def test_video_and_image_masks_are_among_the_dummy_inputs(name: str) -> None:
    inputs = dummy_inputs(build(name))
    assert inputs["pixel_values"].ndim == 5 or not bool(inputs["pixel_mask"].all())


def test_a_head_that_did_not_run_keeps_the_norm_as_it_is() -> None:
    heads = Block(lambda self, y: self.linear(y) if self.first else self.other(y), other=nn.Linear(WIDTH, 2))
    heads.linear, heads.first = nn.Linear(WIDTH, 2), True
    assert "other did not run" in fold_block(heads).reason


def test_inputs_whose_outputs_are_not_finite_check_nothing_and_are_refused() -> None:
    block = Block(lambda self, y: self.linear(y))
    before = state(block)
    with pytest.raises(ValueError, match="hold no finite number"):
        fold_block(block, fold_inputs={"x": torch.full((2, 5, WIDTH), float("nan"))})
    assert unchanged(block, before)


def test_alpha_dropout_is_no_linear_operation() -> None:
    block = Block(lambda self, y: self.linear(self.drop(y)), drop=nn.AlphaDropout(0.5))
    assert "alpha_dropout" in fold_block(block).reason


@pytest.mark.parametrize("affine", ["fold", "fade"])
@pytest.mark.parametrize("changed", [{"eps": 0.5}, {"centered": True}])
def test_another_function_to_start_from_is_refused(affine: str, changed: dict[str, Any]) -> None:
    model = build("llama")
    before = state(model)
    with pytest.raises(ValueError, match=f"does not go with affine='{affine}'"):
        patch_model(model, "layernorm-simple", affine=affine, targets="rmsnorm", **changed)
    assert unchanged(model, before)


def test_k_comes_in_slowly_after_an_earlier_fold_to_layernorm_simple() -> None:
    model = build("gpt2-lm untied")
    inputs = dummy_inputs(model)
    before = logits(model, inputs)
    quietly(patch_model, model, "layernorm-simple", affine="fold")
    quietly(patch_model, model, "adanorm", k=0.1, affine="fold")
    assert difference(logits(model, inputs), before) <= 1e-5
    set_fade(model, 1.0)
    assert difference(logits(model, inputs), before) > 1e-3


def test_hidden_states_that_change_are_listed_though_they_are_returned_on_request_only() -> None:
    assert "hidden_states.2" in fold_affine(build("gpt2-lm untied")).changed


def test_what_an_approximate_fold_drops_is_said() -> None:
    with pytest.warns(UserWarning, match=r"4 norms folded but for the deviation .*at bert\."):
        patch_model(build("bert-cls"), "layernorm-simple", affine="fold", on_unfoldable="approximate")


def test_the_tolerance_is_that_of_the_weights_that_change() -> None:
    block = Block(lambda self, y: self.linear(y))
    block.unrelated = nn.Parameter(torch.ones(2, dtype=torch.bfloat16))
    block.linear.register_forward_pre_hook(lambda module, args: (args[0] * 1.1,))
    with pytest.raises(RuntimeError, match="above the tolerance 1e-04"):
        fold_block(block)


def test_padding_of_the_decoder_is_told_by_its_own_mask() -> None:
    model = build("bart")
    ids, mask = torch.randint(4, 20, (2, 8)), torch.ones(2, 8, dtype=torch.int64)
    mask[0, 5:] = 0
    inputs = {"input_ids": ids, "attention_mask": mask, "decoder_input_ids": ids}
    assert real_rows(model, "model.encoder.layernorm_embedding", inputs, (2, 8)).sum() == 13
    assert real_rows(model, "model.decoder.layernorm_embedding", inputs, (2, 8)) is None
    inputs["decoder_attention_mask"] = torch.flip(mask, [0])
    assert real_rows(model, "model.decoder.layernorm_embedding", inputs, (2, 8))[0].all()
    assert real_rows(model, "model.decoder.layernorm_embedding", inputs, (2, 7)) is None


def test_a_norm_in_half_precision_before_a_head_in_full_folds() -> None:
    block = Block(lambda self, y: self.linear(y.float()))
    block.norm.bfloat16()
    assert fold_block(block, fold_inputs={"x": torch.randn(2, 5, WIDTH, dtype=torch.bfloat16)}).action == "folded"
