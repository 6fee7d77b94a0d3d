"""Folding gains and biases into the layers that read the norm: what folds is exact, all or nothing, and saved."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from hf_adanorm import Fold, fold_affine, is_patched, patch_model, unpatch_model
from hf_adanorm.folding.fold import fold_norms
from hf_adanorm.running import dummy_inputs
from hf_adanorm.saving import folded_norms, install
from hf_adanorm.swapping import all_or_nothing
from tests.zoo.fold_blocks import WIDTH, Block, difference, fold_block, norm, quietly, state, unchanged
from tests.zoo.fold_models import build, logits
from tests.zoo.processes import alone

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


X = torch.randn(2, 5, WIDTH)
BLOCKS = {
    **{
        f"convolution of {groups} groups": lambda groups=groups: Block(
            lambda self, y: self.conv(y.transpose(1, 2)), conv=nn.Conv1d(WIDTH, WIDTH, 3, groups=groups, bias=False)
        )
        for groups in (1, 2, WIDTH)
    },
    "columns of another tensor": lambda: Block(
        lambda self, y: self.wide(torch.cat([y, torch.ones(2, 5, 2)], -1)), wide=nn.Linear(WIDTH + 2, 3)
    ),
    "two norms side by side": lambda: Block(
        lambda self, y: self.wide(torch.cat([y, self.other(X + 1)], -1)), other=norm(), wide=nn.Linear(2 * WIDTH, 3)
    ),
}


@pytest.mark.parametrize("name", BLOCKS)
def test_layers_fold_by_the_channels_that_they_read(name: str) -> None:
    block = BLOCKS[name]().eval()
    before = block(X)
    report = fold_affine(block, inputs={"x": X})
    assert {norm.action for norm in report.norms} == {"folded"}
    torch.testing.assert_close(block(X), before)


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
    folded = fold_block(block, inputs={"x": x}).action == "folded"
    for old, value in zip(before, (x, other), strict=True):
        torch.testing.assert_close(block(value), old, rtol=1e-9, atol=1e-9)
    spoiled = bool({"gelu", "square", "round", "floor"} & set(moves)) or (bias and bool({"pad", "halve"} & set(moves)))
    assert folded or spoiled


# --- all or nothing --------------------------------------------------------------------------------------------------


def test_folding_twice_changes_nothing() -> None:
    model = build("whisper")
    fold_affine(model)
    before = state(model)
    report = fold_affine(model)
    assert len(report.names("nothing to fold")) == 11
    assert unchanged(model, before)


def test_a_difference_above_the_tolerance_undoes_everything() -> None:
    model = build("whisper")
    head = model.proj_out
    head.weight = nn.Parameter(head.weight.detach().clone())
    head.register_forward_pre_hook(lambda module, args: (args[0] * 1.1,))  # after the norm's bias, which it scales
    before, spec = state(model), getattr(model.config, "adanorm", None)
    with pytest.raises(RuntimeError, match="above the tolerance 1e-04"):
        fold_affine(model)
    assert unchanged(model, before, rounding=True)
    assert getattr(model.config, "adanorm", None) == spec
    assert folded_norms(model) == []


def test_a_tolerance_that_is_given_holds_for_inexact_folds_and_undoing_them_restores_eps() -> None:
    model = build("bert-cls")
    before, eps = state(model), [m.eps for m in model.modules() if isinstance(m, nn.LayerNorm)]
    for call in (fold_affine, lambda m, **options: quietly(patch_model, m, affine=Fold(**options))):
        with pytest.raises(RuntimeError, match="above the tolerance 1e-03"):
            call(model, unfoldable="approximate", tolerance=1e-3)
        assert unchanged(model, before, rounding=True)
        assert [m.eps for m in model.modules() if isinstance(m, nn.LayerNorm)] == eps


def test_the_tolerance_is_that_of_the_coarsest_type_computed_with() -> None:
    model = build("gemma").double()  # its norms compute in float32 whatever they get
    inputs = dummy_inputs(model)
    before = logits(model, inputs)
    assert fold_affine(model, tied="untie").names("folded")
    assert difference(logits(model, inputs), before) <= 1e-5
    block = Block(lambda self, y: self.linear(y))
    block.unrelated = nn.Parameter(torch.ones(2, dtype=torch.bfloat16))
    block.linear.register_forward_pre_hook(lambda module, args: (args[0] * 1.1,))
    with pytest.raises(RuntimeError, match="above the tolerance 1e-04"):
        fold_block(block)


def test_overflow_in_half_precision_undoes_everything() -> None:
    block = Block(lambda self, y: self.linear(y)).half()
    with torch.no_grad():
        block.linear.weight.fill_(60000.0)
    before = state(block)
    with pytest.raises(RuntimeError, match="overflows"):
        fold_block(block, inputs={"x": torch.randn(2, 5, WIDTH).half()})
    assert unchanged(block, before)


def test_raise_stops_before_anything_changes() -> None:
    model = build("gpt2-lm")
    before = state(model)
    with pytest.raises(ValueError, match=r"1 of 5 norms cannot be folded: transformer.ln_f.*tied"):
        fold_affine(model, unfoldable="raise")
    with pytest.raises(ValueError, match="cannot be folded"):
        patch_model(model, affine=Fold(unfoldable="raise"))
    assert unchanged(model, before)
    assert not is_patched(model)


def test_the_meta_device_and_unknown_inputs_are_refused() -> None:
    with torch.device("meta"):
        model = transformers.BertModel(transformers.BertConfig(num_hidden_layers=1))
    with pytest.raises(ValueError, match="on the meta device"):
        fold_affine(model)
    with pytest.raises(ValueError, match="inputs="):
        fold_affine(Block(lambda self, y: self.linear(y)))


@pytest.mark.parametrize(("unfoldable", "most"), [("keep", 2), ("approximate", 2), ("calibrate", 3)])
def test_a_fold_runs_the_model_at_most_three_times_and_never_in_training_mode(unfoldable: Any, most: int) -> None:
    model = build("bert-mlm").train()
    model.bert.encoder.layer[0].eval()
    flags = [module.training for module in model.modules()]
    passes: list[bool] = []
    model.register_forward_hook(lambda module, *_: passes.append(any(m.training for m in module.modules())))
    fold_affine(model, unfoldable=unfoldable, inputs={"input_ids": torch.randint(4, 100, (4, 12))})
    assert passes == [False] * most
    assert [module.training for module in model.modules()] == flags


@pytest.mark.parametrize("changed", [{"eps": 0.5}, {"centered": True}])
@pytest.mark.parametrize("swapped", [False, True])
def test_another_function_to_start_from_is_refused(swapped: bool, changed: dict[str, Any]) -> None:
    model = build("llama")
    if swapped:
        patch_model(model, "layernorm-simple", affine="fold", targets="rmsnorm")
    before, options = state(model), Fold(unfoldable="calibrate", inputs=dummy_inputs(model))
    with pytest.raises(ValueError, match="does not go with affine='fold'"):
        patch_model(model, "adanorm", affine=options, targets="rmsnorm", **changed)
    assert unchanged(model, before)


def test_hidden_states_that_change_are_listed_though_they_are_returned_on_request_only() -> None:
    assert "hidden_states.2" in fold_affine(build("gpt2-lm untied")).changed


def test_a_norm_in_half_precision_before_a_head_in_full_folds() -> None:
    block = Block(lambda self, y: self.linear(y.float()))
    block.norm.bfloat16()
    assert fold_block(block, inputs={"x": torch.randn(2, 5, WIDTH, dtype=torch.bfloat16)}).action == "folded"


def test_inputs_whose_outputs_are_not_finite_check_nothing_and_are_refused() -> None:
    block = Block(lambda self, y: self.linear(y))
    before = state(block)
    with pytest.raises(ValueError, match="hold no finite number"):
        fold_block(block, inputs={"x": torch.full((2, 5, WIDTH), float("nan"))})
    assert unchanged(block, before)


# --- saving ----------------------------------------------------------------------------------------------------------


def reload(folders: list[Path]) -> None:
    for folder in folders:
        saved = torch.load(folder / "expected.pt", weights_only=True)
        cls = getattr(transformers, (folder / "class.txt").read_text())
        model, info = cls.from_pretrained(folder, output_loading_info=True)
        assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys")), (folder, info)
        with torch.no_grad():
            output = model.eval()(**saved["inputs"])
        result = output["logits"] if "logits" in output else output[0]
        torch.testing.assert_close(result, saved["logits"])
        model.save_pretrained(folder / "again")
        again = cls.from_pretrained(folder / "again").eval()
        with torch.no_grad():
            torch.testing.assert_close(again(**saved["inputs"])[0], output[0])


SAVED = {
    "gpt2": ("gpt2-lm untied", {"norm": "adanorm", "C": 1.3, "k": 0.07, "affine": "fold"}),
    "whisper": ("whisper", {"norm": "layernorm-simple", "affine": "fold"}),
    "bert": ("bert-cls", {"norm": "adanorm", "affine": Fold(unfoldable="approximate")}),
    "swin": ("swin", {"norm": "layernorm-simple", "affine": "fold"}),
}


def test_folded_models_reload_through_stock_calls_in_another_process(tmp_path: Path) -> None:
    folders = []
    for name, (architecture, options) in SAVED.items():
        model = build(architecture)
        inputs = dummy_inputs(model)
        quietly(patch_model, model, **options)
        folders.append(tmp_path / name)
        model.save_pretrained(folders[-1])
        torch.save({"inputs": inputs, "logits": logits(model, inputs)}, folders[-1] / "expected.pt")
        (folders[-1] / "class.txt").write_text(type(model).__name__)
    base = build("bert-cls").bert  # its last norm is the output: kept, with another eps
    inputs = dummy_inputs(base)
    quietly(patch_model, base, "layernorm-simple", affine=Fold(unfoldable="approximate"))
    assert list(base.config.adanorm["eps"]) == ["encoder.layer.1.output.LayerNorm"]
    folders.append(tmp_path / "base")
    base.save_pretrained(folders[-1])
    with torch.no_grad():
        torch.save({"inputs": inputs, "logits": base(**inputs)[0]}, folders[-1] / "expected.pt")
    (folders[-1] / "class.txt").write_text("BertModel")
    alone(reload, tmp_path, folders)


def test_a_bias_that_was_added_is_loaded_with_its_head_and_not_lost_without_the_package(tmp_path: Path) -> None:
    model = build("gpt2-lm untied")
    assert not fold_affine(model).is_stock
    assert model.config.adanorm["biases"] == ["^lm_head"]
    assert model.config.adanorm["groups"] == [{"norm": "layernorm-simple", "modules": ["ln_f"]}]
    model.save_pretrained(tmp_path)
    again = transformers.GPT2LMHeadModel.from_pretrained(tmp_path)
    assert torch.equal(again.lm_head.bias, model.lm_head.bias)
    assert not hasattr(transformers.GPT2Model.from_pretrained(tmp_path), "lm_head")
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
    torch.testing.assert_close(logits(reloaded(model, tmp_path), inputs), logits(model, inputs))


def test_layers_quantized_to_8_bits_and_back_lose_no_bias_of_a_fold(tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    model = build("stablelm")  # none of its layers but one has a bias of its own
    quietly(patch_model, model, "layernorm-simple", affine="fold")
    model.save_pretrained(tmp_path / "folded")
    how = transformers.BitsAndBytesConfig(load_in_8bit=True)
    model = type(model).from_pretrained(tmp_path / "folded", quantization_config=how).eval()
    inputs = {"input_ids": torch.arange(4, 12)[None]}
    torch.testing.assert_close(logits(reloaded(model, tmp_path / "quantized"), inputs), logits(model, inputs))
    model = model.dequantize(torch.float32)
    torch.testing.assert_close(logits(reloaded(model, tmp_path / "whole"), inputs), logits(model, inputs))


def test_the_eps_of_a_fold_outlives_the_norm_that_it_was_adjusted_on(tmp_path: Path) -> None:
    model = build("bert-cls").bert
    inputs = dummy_inputs(model)
    quietly(patch_model, model, "layernorm-simple", affine=Fold(unfoldable="approximate"))
    last = model.encoder.layer[1].output
    other = nn.LayerNorm(last.LayerNorm.weight.shape, last.LayerNorm.eps)
    other.load_state_dict(last.LayerNorm.state_dict())
    last.LayerNorm = other
    again = reloaded(model, tmp_path)
    assert again.encoder.layer[1].output.LayerNorm.eps == other.eps != model.config.layer_norm_eps
    with torch.no_grad():
        torch.testing.assert_close(again(**inputs)[0], model(**inputs)[0])


def test_an_eps_that_was_adjusted_lasts_through_a_second_patch_and_back() -> None:
    model = build("bert-cls").bert
    norm = "encoder.layer.0.output.LayerNorm"
    patch_model(model, "layernorm-simple", include=norm)
    how = {"affine": Fold(unfoldable="approximate")}
    quietly(patch_model, model, "layernorm-simple", include="attention.output.LayerNorm", **how)
    adjusted = model.get_submodule(norm).eps
    patch_model(model, "detachnorm", include=norm)
    quietly(unpatch_model, model)
    assert model.get_submodule(norm).eps == adjusted != model.config.layer_norm_eps


def test_a_given_eps_is_saved_where_the_model_has_it_in_memory_alone(tmp_path: Path) -> None:
    model = build("bert-cls").bert
    norm = "encoder.layer.0.output.LayerNorm"
    model.get_submodule(norm).eps = 0.1
    quietly(patch_model, model, "layernorm-simple", include=norm, eps=0.1)
    assert reloaded(model, tmp_path).get_submodule(norm).eps == 0.1


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


def test_only_the_named_norms_are_folded() -> None:
    model = build("vit")
    with all_or_nothing(model) as change:
        report = fold_norms(change, ["vit.layernorm"], Fold())
    assert report.names("folded") == ["vit.layernorm"]
    assert bool((model.vit.layernorm.weight == 1).all())
    assert not bool((first_layer(model).layernorm_before.weight == 1).all())
