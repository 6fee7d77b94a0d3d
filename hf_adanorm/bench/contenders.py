"""What the benchmark compares: the norms, and the models that they are put into."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
import transformers as tf
from torch import Tensor, nn

from hf_adanorm.modeling_adanorm import NORM_CLASSES, AdaNorm
from hf_adanorm.patching import patch_model

BASELINE = "layernorm"
OWN = tuple(norm for norm in NORM_CLASSES if norm != "none")


class WrittenOut(nn.Module):
    """AdaNorm as its formula reads: the mean, the variance, N(x), phi and the product, each with its own tensor."""

    def __init__(self, eps: float, C: float = 1.0, k: float = 0.1) -> None:
        super().__init__()
        self.eps, self.C, self.k = eps, C, k

    def forward(self, x: Tensor) -> Tensor:
        mean = x.mean(-1, keepdim=True)
        var = ((x - mean) ** 2).mean(-1, keepdim=True)
        y = (x - mean) / torch.sqrt(var + self.eps)
        phi = self.C * (1 - self.k * y)
        return phi.detach() * y


def contenders(width: int, dtype: torch.dtype, eps: float = 1e-5) -> dict[str, nn.Module]:
    """The norms that are compared, by name; the baseline comes first. "adanorm-torch" is AdaNorm on torch's operators
    also where the fused CPU loop would serve it."""
    return {
        BASELINE: nn.LayerNorm(width, eps, dtype=dtype),
        **{norm: NORM_CLASSES[norm](width, eps, dtype=dtype) for norm in OWN},
        "adanorm-torch": AdaNorm(width, eps),
        "adanorm-lancopku": AdaNorm(width, eps, reference="lancopku"),
        "adanorm-written": WrittenOut(eps),
        "rmsnorm": nn.RMSNorm(width, eps, dtype=dtype),
    }


@dataclass(frozen=True, kw_only=True)
class Size:
    """Of the models that are timed: "small" fits two slow cores, "base" a GPU."""

    width: int
    layers: int
    heads: int
    vocabulary: int
    batch: int
    length: int
    """Tokens in a sequence; a ViT gets the square image whose patches come closest."""


SIZES = {
    "tiny": Size(width=32, layers=2, heads=2, vocabulary=128, batch=2, length=16),
    "small": Size(width=256, layers=4, heads=4, vocabulary=4096, batch=4, length=128),
    "base": Size(width=768, layers=12, heads=12, vocabulary=32768, batch=32, length=256),
}
MODELS = ("bert", "gpt2", "marian", "vit")


def build_model(kind: str, size: Size) -> tuple[nn.Module, dict[str, Tensor], int]:
    """A randomly initialised model of `kind` (one of MODELS), a batch with labels, and the tokens in that batch."""
    width, layers, heads, vocabulary = size.width, size.layers, size.heads, size.vocabulary
    tokens = torch.randint(5, vocabulary, (size.batch, size.length))
    batch = {"input_ids": tokens, "labels": tokens}
    if kind == "bert":
        sizes: dict[str, Any] = {"hidden_size": width, "num_hidden_layers": layers, "num_attention_heads": heads}
        bert = tf.BertConfig(vocab_size=vocabulary, intermediate_size=4 * width, **sizes)
        return tf.BertForMaskedLM(bert), batch, tokens.numel()
    if kind == "gpt2":
        gpt2 = tf.GPT2Config(vocab_size=vocabulary, n_embd=width, n_layer=layers, n_head=heads)
        return tf.GPT2LMHeadModel(gpt2), batch, tokens.numel()
    if kind == "marian":
        side = {"layers": max(1, layers // 2), "attention_heads": heads, "ffn_dim": 4 * width}
        sizes = {f"{name}_{key}": value for name in ("encoder", "decoder") for key, value in side.items()}
        sizes |= {"vocab_size": vocabulary, "d_model": width}
        marian = tf.MarianConfig(pad_token_id=0, decoder_start_token_id=0, eos_token_id=0, **sizes)
        return tf.MarianMTModel(marian), batch, 2 * tokens.numel()
    if kind == "vit":
        patches = max(1, math.isqrt(size.length))
        sizes = {"hidden_size": width, "num_hidden_layers": layers, "num_attention_heads": heads}
        vit = tf.ViTConfig(image_size=8 * patches, patch_size=8, intermediate_size=4 * width, **sizes)
        images = torch.randn(size.batch, 3, 8 * patches, 8 * patches)
        labels = torch.randint(0, 2, (size.batch,))  # a config has two classes by default
        return tf.ViTForImageClassification(vit), {"pixel_values": images, "labels": labels}, size.batch * patches**2
    raise ValueError(f"model must be one of {', '.join(MODELS)}, got {kind!r}")


def with_norm(model: nn.Module, norm: str) -> nn.Module:
    """`model` with every `nn.LayerNorm` replaced by the contender called `norm`."""
    if norm in OWN:
        return patch_model(model, norm, eps=None)
    for parent in list(model.modules()):
        for name, child in parent.named_children():
            if isinstance(child, nn.LayerNorm) and norm != BASELINE:
                replacement = contenders(child.normalized_shape[0], child.weight.dtype, child.eps)[norm]
                setattr(parent, name, replacement)
    return model


def count_norms(model: nn.Module) -> int:
    kinds = (nn.LayerNorm, nn.RMSNorm, WrittenOut)
    return sum(isinstance(m, kinds) or getattr(m, "is_adanorm_module", False) for m in model.modules())
