"""patch_model, unpatch_model, inspect_model and is_patched on models in memory."""

from __future__ import annotations

import copy
import io
import pickle
import time
import warnings
from typing import Any, cast

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers import AutoModelForMaskedLM, BertConfig, BertForMaskedLM, BertModel

from hf_adanorm import (
    AdaNorm,
    DetachNorm,
    LayerNormSimple,
    NoNorm,
    inspect_model,
    is_patched,
    patch_model,
    unpatch_model,
    watch_norms,
)
from hf_adanorm.modeling_adanorm import is_swapped
from tests.zoo.round_trip import CASES, SWAPS, build, difference, inputs, norms, run, tiny

pytestmark = pytest.mark.filterwarnings("ignore:the trained gains and biases:UserWarning")


# -------------------------------------------------------------------------------------------------------- what it does


@pytest.mark.parametrize(
    ("norm", "cls"),
    {"adanorm": AdaNorm, "layernorm-simple": LayerNormSimple, "detachnorm": DetachNorm, "none": NoNorm}.items(),
)
def test_every_norm_swaps_every_layernorm_and_returns_the_model(norm: str, cls: type) -> None:
    model = tiny()
    names = [name for name, module in model.named_modules() if isinstance(module, nn.LayerNorm)]
    assert patch_model(model, norm) is model
    found = {name: module for name, module in model.named_modules() if isinstance(module, cls)}
    assert list(found) == names
    assert not any(isinstance(module, nn.LayerNorm) for module in model.modules())
    assert {(m.normalized_shape, m.eps) for m in found.values()} == {((32,), 1e-12)}
    assert is_patched(model)


def test_patched_model_computes_what_its_formula_says() -> None:
    """Against the same model with each LayerNorm's output computed by the paper's formula in a hook."""
    model = build("bert")
    expected = copy.deepcopy(model)

    def formula(module: nn.Module, args: tuple[Tensor], output: Tensor) -> Tensor:
        x = args[0]
        centered = x - x.mean(-1, keepdim=True)
        y = centered / (centered.square().mean(-1, keepdim=True) + 1e-3).sqrt()
        return 1.3 * (1 - 0.07 * y.detach()) * y

    for module in expected.modules():
        if isinstance(module, nn.LayerNorm):
            module.register_forward_hook(formula)
    patch_model(model, **SWAPS["adanorm"])
    assert difference(run(model, inputs("bert")), run(expected, inputs("bert"))) < 1e-5


def test_second_call_changes_only_what_it_matches() -> None:
    model = patch_model(tiny(), "adanorm", C=1.3, eps=1e-3)
    untouched = {
        name: module for name, module in model.named_modules() if isinstance(module, AdaNorm) and ".0." not in name
    }
    patch_model(model, "detachnorm", layers=[0])
    assert {name for name, m in model.named_modules() if isinstance(m, DetachNorm)} == {
        "bert.encoder.layer.0.attention.output.LayerNorm",
        "bert.encoder.layer.0.output.LayerNorm",
    }
    for name, module in untouched.items():
        assert model.get_submodule(name) is module
    assert {module.eps for module in model.modules() if is_swapped(module)} == {1e-3}


def test_same_call_twice_changes_nothing() -> None:
    model = patch_model(tiny(), **SWAPS["adanorm"])
    before, spec = norms(model), model.config.adanorm
    modules = [id(m) for m in model.modules()]
    patch_model(model, **SWAPS["adanorm"])
    assert [id(m) for m in model.modules()] == modules
    assert (norms(model), model.config.adanorm) == (before, spec)


class Around(nn.Module):
    """A user's norm that holds a LayerNorm."""

    def __init__(self, normalized_shape: Any, eps: float = 1e-5) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(normalized_shape, eps)

    def forward(self, x: Tensor) -> Tensor:
        return 2 * self.norm(x)


def test_a_norm_inside_a_swapped_norm_belongs_to_it() -> None:
    model = patch_model(tiny(), Around)
    rows = [row.name for row in inspect_model(model).rows]
    assert rows == [row.name for row in inspect_model(tiny()).rows]
    assert {line[2] for line in inspect_model(model).table()} == {"-"}  # what the class computes is not known
    modules = [id(m) for m in model.modules()]
    patch_model(model, Around)
    assert [id(m) for m in model.modules()] == modules
    assert not any(isinstance(m, Around) for m in patch_model(model, "adanorm").modules())
    with watch_norms(model) as log:
        model(torch.arange(4)[None])[0].square().sum().backward()
    assert sorted(log.names) == sorted(rows)


def test_a_call_with_another_value_changes_it() -> None:
    model = patch_model(tiny(), "adanorm", C=1.3)
    patch_model(model, "adanorm", C=1.5)
    assert {m.C for m in model.modules() if isinstance(m, AdaNorm)} == {1.5}
    assert {group["settings"]["C"] for group in model.config.adanorm["groups"]} == {1.5}


@settings(max_examples=15, deadline=None)
@given(st.lists(st.tuples(st.sampled_from(sorted(SWAPS)), st.sampled_from([0, 1, -1, None])), min_size=1, max_size=4))
def test_any_sequence_of_patches_is_undone_bit_for_bit(calls: list[tuple[str, int | None]]) -> None:
    model = build("bert")
    stock = build("bert")
    for swap, layer in calls:
        patch_model(model, **SWAPS[swap], layers=layer)
    last = {layer: swap for swap, layer in calls}
    if None in last:
        assert len(norms(model)) == 6
    unpatch_model(model)
    assert norms(model) == {}
    old, new = stock.state_dict(), model.state_dict()
    assert old.keys() == new.keys()
    assert all(torch.equal(old[key], new[key]) for key in old)
    torch.testing.assert_close(model(**inputs("bert")).logits, stock(**inputs("bert")).logits)
    assert getattr(model.config, "adanorm", None) is None


# ------------------------------------------------------------------------------------------------- siblings and copies


def test_models_from_one_config_object_do_not_share_a_patch() -> None:
    config = CASES["bert"].config()
    one, other = BertForMaskedLM(config), BertForMaskedLM(config)
    patch_model(one)
    assert not is_patched(other)
    assert getattr(other.config, "adanorm", None) is None
    assert getattr(config, "adanorm", None) is None
    assert not is_patched(BertForMaskedLM(config))
    assert one.config is one.bert.config
    assert one.config is not other.config


def test_a_deep_copy_is_independent_and_can_be_unpatched() -> None:
    stock = build("bert")
    model = patch_model(build("bert"), **SWAPS["adanorm"])
    twin = copy.deepcopy(model)
    unpatch_model(twin)
    assert is_patched(model)
    assert not is_patched(twin)
    for other in (twin, unpatch_model(model)):
        values = zip(stock.state_dict().values(), other.state_dict().values(), strict=True)
        assert all(torch.equal(one, two) for one, two in values)


def test_shared_norm_instance_stays_shared() -> None:
    norm = nn.LayerNorm(4)
    model = nn.ModuleDict({"a": nn.Sequential(norm), "b": nn.Sequential(nn.Linear(4, 4), norm)})
    patch_model(model)
    assert isinstance(model["a"][0], AdaNorm)
    assert model["a"][0] is model["b"][1]
    unpatch_model(model)
    assert model["a"][0] is model["b"][1] is norm


def test_a_pickle_computes_the_same_and_leaves_the_model_as_it_was() -> None:
    model = patch_model(build("bert"), **SWAPS["adanorm"])
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    again = torch.load(buffer, weights_only=False)
    assert norms(again) == norms(model)
    torch.testing.assert_close(again(**inputs("bert")).logits, model(**inputs("bert")).logits)
    with pytest.warns(UserWarning, match="6 of 6 norms.*gain 1 and bias 0"):
        unpatch_model(again)
    assert torch.equal(again.bert.embeddings.LayerNorm.weight, torch.ones(32))
    assert torch.equal(again.bert.embeddings.LayerNorm.bias, torch.zeros(32))
    unpatch_model(model)
    assert torch.equal(model.bert.embeddings.LayerNorm.weight, build("bert").bert.embeddings.LayerNorm.weight)


def test_pickle_holds_no_tensors_of_the_replaced_norms() -> None:
    model = nn.Sequential(nn.LayerNorm(100_000))
    assert len(pickle.dumps(patch_model(model))) < 20_000


# ---------------------------------------------------------------------------------------------------------- unpatching


def test_unpatch_after_reload_warns_once_and_gives_gain_1_bias_0(tmp_path: Any) -> None:
    patch_model(build("bert"), eps=1e-3).save_pretrained(tmp_path)
    model = AutoModelForMaskedLM.from_pretrained(tmp_path)
    with pytest.warns(UserWarning, match="gain 1 and bias 0") as caught:
        unpatch_model(model)
    assert len(caught) == 1
    for module in model.modules():
        if isinstance(module, nn.LayerNorm):
            assert torch.equal(module.weight, torch.ones(32))
            assert torch.equal(module.bias, torch.zeros(32))
            assert module.weight.requires_grad
    assert torch.isfinite(model(**inputs("bert")).logits).all()


def test_unpatch_of_a_stock_model_raises() -> None:
    with pytest.raises(ValueError, match="no swapped norm"):
        unpatch_model(tiny())


# ---------------------------------------------------------------------------------------------------- plain nn.Modules


def test_plain_module_is_patched_and_its_state_dict_restores_it() -> None:
    def make() -> nn.Sequential:
        return nn.Sequential(nn.Linear(4, 6), nn.LayerNorm(6), nn.Linear(6, 2))

    model = patch_model(make(), C=1.3)
    again = patch_model(make(), C=1.3)
    again.load_state_dict(model.state_dict())
    x = torch.randn(3, 4)
    torch.testing.assert_close(model(x), again(x))
    with pytest.raises(RuntimeError, match="size mismatch"):
        make().load_state_dict(model.state_dict(), strict=False)


def test_a_model_that_is_a_norm_itself_or_no_module_raises() -> None:
    with pytest.raises(ValueError, match="is the norm itself"):
        patch_model(nn.LayerNorm(4))
    with pytest.raises(TypeError, match=r"must be a torch\.nn\.Module, got dict"):
        patch_model(cast(Any, {}))


@pytest.mark.parametrize("norm", SWAPS)
@pytest.mark.parametrize("norm_first", [False, True])
def test_fast_path_of_torchs_encoder_gives_what_the_slow_one_gives(norm: str, norm_first: bool) -> None:
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch says that norm_first rules nested tensors out
        layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True, norm_first=norm_first)
        model = nn.TransformerEncoder(layer, 2, norm=nn.LayerNorm(16))
    patch_model(model, **SWAPS[norm])
    x, mask = torch.randn(3, 5, 16), torch.tensor([[False] * 5, [False] * 4 + [True], [False] * 2 + [True] * 3])
    slow = model.train()(x, src_key_padding_mask=mask)
    model.eval()
    with torch.no_grad():  # what may take the fused path
        fast = model(x, src_key_padding_mask=mask)
    assert torch.allclose(fast[~mask], slow[~mask], atol=1e-5)


def test_unpatched_encoder_may_take_the_fast_path_again() -> None:
    layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
    model = nn.TransformerEncoder(layer, 2).eval()
    flags = [(m.activation_relu_or_gelu) for m in model.layers], model.use_nested_tensor
    unpatch_model(patch_model(model))
    assert ([(m.activation_relu_or_gelu) for m in model.layers], model.use_nested_tensor) == flags


# --------------------------------------------------------------------------------------------------------------- speed


def test_patching_bert_large_takes_seconds_at_most() -> None:
    sizes = {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16, "intermediate_size": 4096}
    with torch.device("meta"):
        model = BertModel(BertConfig(**sizes))
    for module in model.modules():  # real norms, the rest would only take time to make
        if isinstance(module, nn.LayerNorm):
            module.to_empty(device="cpu").reset_parameters()
    start = time.process_time()
    patch_model(model)
    seconds = time.process_time() - start
    assert len(norms(model)) == 49
    assert seconds < 5
