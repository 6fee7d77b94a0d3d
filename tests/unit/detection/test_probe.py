"""Recognize what a module computes by running a copy: every family of norm class in transformers, and users' own."""

from __future__ import annotations

import math
import types
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hf_adanorm.detection import NormInfo, recognize
from tests.zoo.norm_classes import transformers_class

WIDTH = 24


# (class, arguments, kind, eps, channels first, has gain, has bias, gain offset)
FAMILIES: list[tuple[str, tuple[Any, ...], dict[str, Any], str, float, bool, bool, bool, float]] = [
    ("deberta.modeling_deberta:DebertaLayerNorm", (WIDTH,), {}, "layernorm", 1e-12, False, True, True, 0),
    ("esm.modeling_esmfold:EsmFoldLayerNorm", (WIDTH,), {}, "layernorm", 1e-5, False, True, True, 0),
    ("esmc.modeling_esmc:EsmcLayerNorm", (WIDTH,), {}, "layernorm", 1e-5, False, True, True, 0),
    ("esmfold2.modeling_esmfold2:EsmFold2LayerNorm", (WIDTH,), {"bias": False},
     "layernorm", 1e-5, False, True, False, 0),
    ("pocket_tts.modeling_pocket_tts:PocketTTSFlowLayerNorm", (WIDTH,), {}, "layernorm", 1e-5, False, True, True, 0),
    ("convnext.modeling_convnext:ConvNextLayerNorm", (WIDTH,), {}, "layernorm", 1e-6, False, True, True, 0),
    ("convnext.modeling_convnext:ConvNextLayerNorm", (WIDTH,), {"data_format": "channels_first", "eps": 3e-4},
     "layernorm", 3e-4, True, True, True, 0),
    ("sam.modeling_sam:SamLayerNorm", (WIDTH,), {"data_format": "channels_first"},
     "layernorm", 1e-6, True, True, True, 0),
    ("rf_detr.modeling_rf_detr:RfDetrLayerNorm", (WIDTH,), {"data_format": "channels_first"},
     "layernorm", 1e-6, True, True, True, 0),
    ("vitdet.modeling_vitdet:VitDetLayerNorm", (WIDTH,), {}, "layernorm", 1e-6, True, True, True, 0),
    ("eomt.modeling_eomt:EomtLayerNorm2d", (WIDTH,), {}, "layernorm", 1e-6, True, True, True, 0),
    ("eomt.modeling_eomt:EomtLayerNorm2d", (WIDTH,), {"affine": False}, "layernorm", 1e-6, True, False, False, 0),
    ("squeezebert.modeling_squeezebert:SqueezeBertLayerNorm", (WIDTH,), {}, "layernorm", 1e-12, True, True, True, 0),
    ("cohere.modeling_cohere:CohereLayerNorm", (WIDTH,), {}, "layernorm", 1e-5, False, True, False, 0),
    ("nemotron.modeling_nemotron:NemotronLayerNorm1P", (WIDTH,), {}, "layernorm", 1e-5, False, True, True, 1),
    ("videoprism.modeling_videoprism:VideoPrismLayerNorm", (WIDTH,), {}, "layernorm", 1e-5, False, True, True, 1),
    ("olmo.modeling_olmo:OlmoLayerNorm", (WIDTH,), {}, "layernorm", 1e-5, False, False, False, 0),
    ("t5.modeling_t5:T5LayerNorm", (WIDTH,), {}, "rmsnorm", 1e-6, False, True, False, 0),
    ("llama.modeling_llama:LlamaRMSNorm", (WIDTH,), {"eps": 2e-5}, "rmsnorm", 2e-5, False, True, False, 0),
    ("gemma.modeling_gemma:GemmaRMSNorm", (WIDTH,), {}, "rmsnorm", 1e-6, False, True, False, 1),
    ("gemma3n.modeling_gemma3n:Gemma3nRMSNorm", (WIDTH,), {}, "rmsnorm", 1e-6, False, True, False, 0),
    ("imagegpt.modeling_imagegpt:ImageGPTLayerNorm", (WIDTH,), {}, "rmsnorm", 1e-5, False, True, False, 0),
    ("xlstm.modeling_xlstm:xLSTMRMSNorm", (WIDTH,), {"use_bias": True}, "rmsnorm", 1e-6, False, True, True, 0),
]  # fmt: skip


# (class, arguments, part of the reason)
LEFT_ALONE = [
    ("chameleon.modeling_chameleon:ChameleonLayerNorm", ((4, 6),), "multi-head LayerNorm"),
    ("cohere.modeling_cohere:CohereLayerNorm", ((4, 6),), "multi-head LayerNorm"),
    ("ibert.quant_modules:IntLayerNorm", (WIDTH, 1e-5), "scaling_factor"),
    ("mamba2.modeling_mamba2:MambaRMSNormGated", (WIDTH, WIDTH), "gate"),
    ("mobilebert.modeling_mobilebert:NoNorm", (WIDTH,), "does not compute"),
    ("poolformer.modeling_poolformer:PoolFormerGroupNorm", (WIDTH,), "group norm"),
    ("detr.modeling_detr:DetrFrozenBatchNorm2d", (WIDTH,), "batch norm"),
    ("pocket_tts.modeling_pocket_tts:PocketTTSTimestepNorm", (WIDTH,), "does not compute"),
    ("llama4.modeling_llama4:Llama4TextL2Norm", (), "does not know the axis' size"),
    (
        "moonshine_streaming.modeling_moonshine_streaming:MoonshineStreamingFrameCMVN",
        (),
        "does not know the axis' size",
    ),
    ("esmfold2.modeling_esmfold2:EsmFold2AdaptiveLayerNorm", (WIDTH,), "conditioned norm"),
    ("qwen2_5_omni.modeling_qwen2_5_omni:Qwen2_5_OmniAdaLayerNormZero", (WIDTH,), "conditioned norm"),
]


def family_id(case: Any) -> str:
    return case.rpartition(":")[2] if isinstance(case, str) and ":" in case else ""


@pytest.mark.parametrize(
    ("path", "args", "kwargs", "kind", "eps", "channels_first", "gain", "bias", "offset"), FAMILIES, ids=family_id
)
@pytest.mark.parametrize(
    ("device", "dtype"), [("cpu", torch.float32), ("cpu", torch.float16), ("meta", torch.bfloat16)]
)
def test_each_family_gets_its_formula(
    path: str, args: Any, kwargs: Any, kind: str, eps: float, channels_first: bool, gain: bool, bias: bool,
    offset: float, device: str, dtype: torch.dtype,
) -> None:  # fmt: skip
    with torch.device(device):
        info = recognize(transformers_class(path)(*args, **kwargs).to(dtype))
    assert info is not None
    assert (info.kind, info.eps, info.channels_first) == (kind, eps, channels_first)
    assert info.normalized_shape == (WIDTH,)
    assert (info.gain_name is not None, info.bias_name is not None, info.gain_offset) == (gain, bias, offset)
    assert info.gain_name == ("weight" if gain else None)


@pytest.mark.parametrize(("path", "args", "reason"), LEFT_ALONE, ids=family_id)
def test_what_is_not_one_of_the_formulas_is_left_alone_with_the_reason(path: str, args: Any, reason: str) -> None:
    info = recognize(transformers_class(path)(*args))
    assert info is not None
    assert info.kind == "other"
    assert reason in info.reason


@pytest.mark.parametrize(
    "path",
    [
        "deberta.modeling_deberta:DebertaLayerNorm",
        "olmo.modeling_olmo:OlmoLayerNorm",
        "nemotron.modeling_nemotron:NemotronLayerNorm1P",
        "gemma.modeling_gemma:GemmaRMSNorm",
    ],
)
def test_the_formula_found_gives_the_module_s_output(path: str) -> None:
    module = transformers_class(path)(WIDTH)
    for parameter in module.parameters():
        nn.init.uniform_(parameter, -1, 1)
    info = recognize(module)
    assert info is not None
    x = torch.randn(5, WIDTH, dtype=torch.float32) * 0.01 + 0.3  # a variance at which eps shows
    y = x.double()
    if info.kind == "layernorm":
        y = y - y.mean(-1, keepdim=True)
    y = y / (y.square().mean(-1, keepdim=True) + info.eps).sqrt()
    if info.gain_name:
        y = y * (info.gain_offset + getattr(module, info.gain_name).double())
    if info.bias_name:
        y = y + getattr(module, info.bias_name).double()
    torch.testing.assert_close(module(x).double(), y, rtol=1e-4, atol=1e-5)


class Written(nn.Module):
    """A LayerNorm as users write it, with its own names and hidden eps."""

    def __init__(self, width: int = WIDTH) -> None:
        super().__init__()
        self.a_2 = nn.Parameter(torch.ones(width))
        self.b_2 = nn.Parameter(torch.zeros(width))

    def forward(self, x: Tensor) -> Tensor:
        centered = x - x.mean(-1, keepdim=True)
        return self.a_2 * centered * torch.rsqrt(centered.square().mean(-1, keepdim=True) + 2.5e-4) + self.b_2


class Unbiased(Written):
    def forward(self, x: Tensor) -> Tensor:
        return self.a_2 * (x - x.mean(-1, keepdim=True)) / (x.std(-1, keepdim=True) + 1e-6) + self.b_2


class EpsOutside(Written):
    def forward(self, x: Tensor) -> Tensor:
        return self.a_2 * (x - x.mean(-1, keepdim=True)) / (x.std(-1, keepdim=True, unbiased=False) + 1e-3) + self.b_2


class LayerScale(Written):
    def forward(self, x: Tensor) -> Tensor:
        return x * self.a_2 + self.b_2


def test_a_users_layernorm_is_recognized_without_a_telling_name() -> None:
    info = recognize(Written())
    assert info == NormInfo(kind="layernorm", normalized_shape=(WIDTH,), eps=2.5e-4, gain_name="a_2", bias_name="b_2")


@pytest.mark.parametrize(
    ("cls", "reason"), [(Unbiased, "something else than its gain"), (EpsOutside, "eps is not added to the variance")]
)
def test_near_misses_are_named(cls: type[nn.Module], reason: str) -> None:
    info = recognize(cls())
    assert info is not None
    assert info.kind == "other"
    assert reason in info.reason


def test_an_affine_module_is_not_a_norm() -> None:
    assert recognize(LayerScale()) is None


@pytest.mark.parametrize("eps", [1e-12, 1e-8, 1e-6, 3.7e-5, 1e-3, 0.1])
@pytest.mark.parametrize("shape", [(WIDTH,), (4, 6)])
def test_a_hidden_eps_is_measured_over_all_axes(shape: tuple[int, ...], eps: float) -> None:
    class HiddenEpsNorm(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(shape))

        def forward(self, x: Tensor) -> Tensor:
            return nn.functional.layer_norm(x, shape, self.weight, None, eps)

    info = recognize(HiddenEpsNorm())
    assert info is not None
    assert (info.kind, info.normalized_shape) == ("layernorm", shape)
    assert math.isclose(info.eps, eps, rel_tol=1e-6)


def test_nothing_is_changed_and_no_random_number_is_drawn() -> None:
    module = transformers_class("deberta.modeling_deberta:DebertaLayerNorm")(WIDTH)
    calls: list[int] = []
    module.register_forward_hook(lambda *_: calls.append(1))
    before = {k: v.clone() for k, v in module.state_dict().items()}
    attributes = dict(module.__dict__)
    state = torch.get_rng_state()
    recognize(module)
    assert torch.equal(state, torch.get_rng_state())
    assert not calls
    assert all(torch.equal(v, before[k]) for k, v in module.state_dict().items())
    assert module.__dict__ == attributes


def test_a_forward_bound_to_the_instance_is_probed() -> None:
    module = nn.LayerNorm(WIDTH)

    def rms(self: nn.LayerNorm, x: Tensor) -> Tensor:
        return self.weight * x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-4)

    module.forward = types.MethodType(rms, module)  # type: ignore[method-assign]
    info = recognize(module)
    assert info is not None
    assert (info.kind, info.eps) == ("rmsnorm", 1e-4)
