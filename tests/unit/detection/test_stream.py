"""Which norms are on the residual stream: known architectures, and small modules that show one rule each."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from hf_adanorm.detection import iter_norms, off_stream
from tasks.image_cnn import LayerNormCnnConfig, LayerNormCnnForImageClassification
from tests.zoo import tiny_models

# model type -> the last parts of the names of norms inside a branch, each with a word of its reason
BRANCHES = {
    "llama": {},
    "bert": {},
    "bart": {},
    "t5": {},
    "albert": {},
    "swin": {},
    "swinv2": {},
    "convnext": {},
    "perceiver": {},
    "gemma2": {},
    "chameleon": {},
    "gemma3_text": {"q_norm": "per head", "k_norm": "per head"},
    "gemma3n_text": {"q_norm": "q_proj", "k_norm": "k_proj"},
    "olmo2": {"q_norm": "output of self_attn.q_proj", "k_norm": "output of self_attn.k_proj"},
    "esmc": {"q_norm": "q_proj", "k_norm": "k_proj"},
    "persimmon": {"q_layernorm": "per head", "k_layernorm": "per head"},
    "deepseek_v32": {"q_a_layernorm": "q_a_proj", "kv_a_layernorm": "kv_a_proj", "k_norm": "self_attn.indexer.wk"},
    "minimax": {"self_attn.norm": "between the input and the output of self_attn (MiniMaxLightningAttention)"},
    "pvt": {"self.layer_norm": "between the input and the output of attention.self"},
    "falcon_mamba": {"dt_layernorm": "x_proj", "b_layernorm": "x_proj", "c_layernorm": "x_proj"},
}


def tiny(model_type: str) -> PreTrainedModel:
    _, config = next(iter(tiny_models.configs(model_type)))
    return tiny_models.build(tiny_models.model_classes(model_type, config)[0], config)


def in_branches(model: nn.Module) -> dict[str, str]:
    return off_stream(model, [norm for norm in iter_norms(model) if norm[2].kind != "other"])


@pytest.mark.parametrize("model_type", BRANCHES)
def test_known_architectures(model_type: str) -> None:
    found = in_branches(tiny(model_type))
    expected = BRANCHES[model_type]
    for ending, word in expected.items():
        reasons = [reason for name, reason in found.items() if name.endswith(f".{ending}")]
        assert reasons
        assert all(word in reason for reason in reasons)
    assert not [name for name in found if not name.endswith(tuple(f".{ending}" for ending in expected))]


@pytest.mark.parametrize("model_type", ["olmo2", "gemma3_text", "bert"])
def test_the_meta_device_gives_the_same_answer(model_type: str) -> None:
    _, config = next(iter(tiny_models.configs(model_type)))
    with torch.device("meta"):
        model = tiny_models.model_classes(model_type, config)[0]._from_config(config)
    assert in_branches(model) == in_branches(tiny(model_type))


class Attention(nn.Module):
    """Returns more than one tensor and normalizes what it makes of its input by hand."""

    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.up = nn.Linear(width, inner)
        self.norm = nn.RMSNorm(inner)
        self.down = nn.Linear(inner, width)

    def forward(self, x: Tensor) -> tuple[Tensor, None]:
        return self.down(self.norm(self.up(x).tanh())), None


class Layer(nn.Module):
    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.before = nn.LayerNorm(width)
        self.attention = Attention(width, inner)
        self.after = nn.LayerNorm(width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.after(self.attention(self.before(x))[0])


class Config(PreTrainedConfig):
    model_type = "stream-test"
    vocab_size = 11
    hidden_size = 8


class Model(PreTrainedModel):
    config_class = Config

    def __init__(self, inner: int, fails: bool = False) -> None:
        super().__init__(Config())
        self.embedding = nn.Embedding(11, 8)
        self.layers = nn.ModuleList(Layer(8, inner) for _ in range(3))
        self.fails = fails

    def forward(self, input_ids: Tensor) -> Tensor:
        if self.fails:
            raise RuntimeError("no inputs suit")
        x = self.embedding(input_ids)
        for layer in self.layers:
            x = layer(x)
        return x


BETWEEN = "it stands between the input and the output of attention (Attention)"


@pytest.mark.parametrize(
    ("inner", "fails", "reasons"),
    [(8, False, 3 * [BETWEEN]), (16, False, 3 * [BETWEEN]), (8, True, []),
     (16, True, 3 * ["its width is 16, that of the residual stream 8"])],
)  # fmt: skip
def test_an_inner_norm_is_skipped_whether_a_pass_or_widths_tell(inner: int, fails: bool, reasons: list[str]) -> None:
    names = (f"layers.{i}.attention.norm" for i in range(3))
    assert in_branches(Model(inner, fails)) == dict(zip(names, reasons, strict=False))


def test_a_network_without_a_residual_stream_keeps_its_norms() -> None:
    """The paper's MNIST model: each layer normalizes the output of its linear layer, at a width of its own."""
    model = LayerNormCnnForImageClassification(LayerNormCnnConfig(linear_sizes=[12, 10], norm_before="linear"))
    assert len(list(iter_norms(model))) > 1
    assert not in_branches(model)


def test_the_pass_ends_when_nothing_is_left_to_decide() -> None:
    model, ran = Model(8), []
    for layer in model.layers:
        layer.register_forward_hook(lambda module, args, output: ran.append(module))
    in_branches(model)
    assert ran == [model.layers[0]]
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_no_pass_where_the_structure_tells() -> None:
    model = tiny("llama")
    model.forward = None  # type: ignore[method-assign,assignment]
    assert not in_branches(model)
