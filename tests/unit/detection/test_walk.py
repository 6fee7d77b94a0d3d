"""The norms of a model: which modules are looked at, what is read off, what a wrapper or a container hides."""

from __future__ import annotations

import time

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from transformers import BertConfig, BertModel, DebertaConfig, DebertaModel

from hf_adanorm import patch_model
from hf_adanorm.detection import iter_norms, recognize
from tests.zoo.norm_classes import transformers_class

WIDTH = 24


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("affine", [True, False])
def test_torch_layernorm_is_read_off(affine: bool, bias: bool) -> None:
    info = recognize(nn.LayerNorm((3, 5), eps=1e-3, elementwise_affine=affine, bias=bias))
    assert info is not None
    assert info.kind == "layernorm"
    assert (info.normalized_shape, info.eps) == ((3, 5), 1e-3)
    assert (info.gain_name is not None, info.bias_name is not None) == (affine, affine and bias)


def test_torch_rmsnorm_default_eps_is_that_of_its_dtype() -> None:
    info = recognize(nn.RMSNorm(8, dtype=torch.bfloat16))
    assert info is not None
    assert (info.kind, info.eps) == ("rmsnorm", torch.finfo(torch.bfloat16).eps)


def test_big_modules_are_never_run() -> None:
    class NormalBigNorm(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.proj = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            raise AssertionError("was run")

    model = nn.Sequential(NormalBigNorm())
    infos = [info for _, _, info in iter_norms(model)]
    assert [info.kind for info in infos] == ["other"]


@pytest.mark.parametrize(
    "path",
    [
        "moonshine_streaming.modeling_moonshine_streaming:MoonshineStreamingLayerNorm",
        "stablelm.modeling_stablelm:StableLmLayerNormPerHead",
    ],
)
def test_a_wrapper_is_not_counted_beside_the_norm_it_holds(path: str) -> None:
    args = (WIDTH,) if "Moonshine" in path else (WIDTH, 2)
    wrapper = transformers_class(path)(*args)
    found = list(iter_norms(nn.ModuleList([wrapper])))
    assert {type(module) for _, module, _ in found} == {nn.LayerNorm}


def test_a_norm_inside_a_conditioned_norm_says_so() -> None:
    cls = transformers_class("qwen2_5_omni.modeling_qwen2_5_omni:Qwen2_5_OmniAdaLayerNormZero")
    found = {name: info for name, _, info in iter_norms(nn.ModuleDict({"ada": cls(WIDTH), "plain": nn.LayerNorm(4)}))}
    assert found["ada"].kind == "other"
    assert found["ada.norm"].inside == "ada (Qwen2_5_OmniAdaLayerNormZero)"
    assert not found["plain"].inside


@pytest.mark.parametrize("cls", [nn.LayerNorm, transformers_class("deberta.modeling_deberta:DebertaLayerNorm")])
def test_parametrized_norms_are_marked(cls: type[nn.Module]) -> None:
    class Double(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * x

    module = cls(WIDTH)
    parametrize.register_parametrization(module, "weight", Double())
    info = recognize(module)
    assert info is not None
    assert info.kind == "layernorm"
    assert info.parametrized


def test_a_forward_replaced_on_the_instance_is_not_trusted() -> None:
    module = nn.LayerNorm(WIDTH)
    module.forward = lambda x: x  # type: ignore[method-assign]
    info = recognize(module)
    assert info is not None
    assert info.kind == "other"
    assert "replaced" in info.reason


def test_accelerate_hooks_do_not_hide_a_norm() -> None:
    hooks = pytest.importorskip("accelerate.hooks")
    model = nn.Sequential(transformers_class("deberta.modeling_deberta:DebertaLayerNorm")(WIDTH), nn.LayerNorm(WIDTH))
    for module in model:
        hooks.add_hook_to_module(module, hooks.ModelHook())
    assert [info.kind for _, _, info in iter_norms(model)] == ["layernorm", "layernorm"]


def test_peft_modules_to_save_shows_both_copies() -> None:
    peft = pytest.importorskip("peft")
    config = DebertaConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, vocab_size=20
    )
    lora = peft.LoraConfig(target_modules=["in_proj"], modules_to_save=["embeddings.LayerNorm"])
    names = [name for name, _, _ in iter_norms(peft.get_peft_model(DebertaModel(config), lora))]
    copies = [name.rpartition("embeddings.LayerNorm.")[2] for name in names if "embeddings.LayerNorm" in name]
    assert copies == ["original_module", "modules_to_save.default"]


def test_swapped_norms_are_listed_in_place() -> None:
    config = BertConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, vocab_size=20
    )
    model = BertModel(config)
    before = [name for name, _, _ in iter_norms(model)]
    patch_model(model, "adanorm", eps=3e-4)
    after = list(iter_norms(model))
    assert [name for name, _, _ in after] == before
    assert all(info.eps == 3e-4 and not info.gain_name for _, _, info in after)


def test_a_deep_model_is_walked_in_no_time() -> None:
    """BERT-large has 49 norms and none is probed; DeBERTa's 49 are probed once."""
    with torch.device("meta"):
        bert = BertModel(BertConfig(hidden_size=1024, num_hidden_layers=24, num_attention_heads=16))
        deberta = DebertaModel(DebertaConfig(num_hidden_layers=24))
    start = time.process_time()
    counts = [len(list(iter_norms(model))) for model in (bert, deberta)]
    assert counts == [49, 49]
    assert time.process_time() - start < 3
