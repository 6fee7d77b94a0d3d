"""Tiny random models of seven architectures, ways to swap their norms, and what it takes to compare two of them.

A fresh LayerNorm equals LayerNorm-simple and DetachNorm in the forward pass, so defaults would hide a missing swap.
Therefore gains and biases are random, C, k and eps are not the defaults, and one detach flag is off.
Imports nothing of hf_adanorm, so that a process without the package can use it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

SWAPS: dict[str, dict[str, Any]] = {
    "adanorm": {"norm": "adanorm", "C": 1.3, "k": 0.07, "eps": 1e-3},
    "layernorm-simple": {"norm": "layernorm-simple", "eps": 1e-3},
    "detachnorm": {"norm": "detachnorm", "detach_mean": False, "eps": 1e-3},
    "none": {"norm": "none", "eps": 1e-3},
}
"""The options of `patch_model` for each norm."""

_ENCODER = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
_SEQ2SEQ = {
    **{f"{part}_{key}": 2 for part in ("encoder", "decoder") for key in ("layers", "attention_heads")},
    "d_model": 32,
    "encoder_ffn_dim": 64,
    "decoder_ffn_dim": 64,
    "vocab_size": 99,
    "max_position_embeddings": 64,
    "pad_token_id": 1,
    "decoder_start_token_id": 1,
}


def _bert() -> PreTrainedConfig:
    return transformers.BertConfig(**_ENCODER, vocab_size=99, max_position_embeddings=64)


def _gpt2() -> PreTrainedConfig:
    return transformers.GPT2Config(
        n_embd=32, n_layer=2, n_head=2, vocab_size=99, n_positions=64, bos_token_id=0, eos_token_id=0, pad_token_id=0
    )


def _clip() -> PreTrainedConfig:
    return transformers.CLIPConfig(
        text_config={**_ENCODER, "vocab_size": 99, "eos_token_id": 2},
        vision_config={**_ENCODER, "image_size": 16, "patch_size": 8},
        projection_dim=16,
    )


@dataclass(frozen=True)
class Case:
    """One architecture."""

    config: Callable[[], PreTrainedConfig]
    auto_class: str
    other_head: str
    """Another class that the same checkpoint loads into."""


CASES: dict[str, Case] = {
    "bert": Case(_bert, "AutoModelForMaskedLM", "AutoModelForSequenceClassification"),
    "gpt2": Case(_gpt2, "AutoModelForCausalLM", "AutoModelForTokenClassification"),
    "bart": Case(
        lambda: transformers.BartConfig(**_SEQ2SEQ), "AutoModelForSeq2SeqLM", "AutoModelForSequenceClassification"
    ),
    "marian": Case(lambda: transformers.MarianConfig(**_SEQ2SEQ), "AutoModelForSeq2SeqLM", "AutoModel"),
    "vit": Case(
        lambda: transformers.ViTConfig(**_ENCODER, image_size=16, patch_size=8),
        "AutoModelForImageClassification",
        "AutoModel",
    ),
    "clip": Case(_clip, "AutoModel", "AutoModelForZeroShotImageClassification"),
    "encoder-decoder": Case(
        lambda: transformers.EncoderDecoderConfig.from_encoder_decoder_configs(
            _bert(), _bert(), decoder_start_token_id=1, pad_token_id=0
        ),
        "AutoModelForSeq2SeqLM",
        "AutoModelForSeq2SeqLM",
    ),
}

PAIRS = [*((case, "adanorm") for case in CASES), *(("bert", swap) for swap in SWAPS if swap != "adanorm")]
"""Every architecture under one norm, and one architecture under every norm."""


def auto_class(name: str) -> Any:
    return getattr(transformers, name)


def build(case: str) -> PreTrainedModel:
    """Return a random model with gains in 0.5 .. 1.5 and biases in +-0.5."""
    torch.manual_seed(0)
    model: PreTrainedModel = auto_class(CASES[case].auto_class).from_config(CASES[case].config())
    return randomize(model)


@torch.no_grad()
def randomize(model: Any) -> Any:
    generator = torch.Generator().manual_seed(1)
    for module in model.modules():
        if isinstance(module, nn.LayerNorm):
            module.weight.copy_(torch.rand(module.weight.shape, generator=generator) + 0.5)
            module.bias.copy_(torch.rand(module.bias.shape, generator=generator) - 0.5)
        elif isinstance(module, nn.Linear):  # large enough for the norms to matter
            module.weight.mul_(5)
    return model.eval()


def tiny() -> transformers.BertForMaskedLM:
    """Return a fresh BERT, its gains 1 and its biases 0."""
    torch.manual_seed(0)
    return transformers.BertForMaskedLM(_bert()).eval()


def inputs(case: str) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(2)
    ids = torch.randint(3, 99, (2, 9), generator=generator)
    pixels = torch.randn(2, 3, 16, 16, generator=generator)
    if case == "vit":
        return {"pixel_values": pixels}
    if case == "clip":
        return {"input_ids": ids, "pixel_values": pixels}
    if case in ("bart", "marian", "encoder-decoder"):
        return {"input_ids": ids, "decoder_input_ids": ids[:, 2:]}
    return {"input_ids": ids}


def run(model: nn.Module, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the output and the gradients with respect to everything that enters the model: embeddings and pixels."""
    model.eval()
    entering: list[Tensor] = []

    def keep(module: nn.Module, args: Any, output: Tensor) -> Tensor:
        output = output.detach().requires_grad_()  # frozen embeddings count as well
        entering.append(output)
        return output

    handles = [m.register_forward_hook(keep) for m in model.modules() if isinstance(m, nn.Embedding)]
    batch = {key: value.clone() for key, value in batch.items()}
    if "pixel_values" in batch:
        entering.append(batch["pixel_values"].requires_grad_())
    found = model(**batch)
    output = next(found[key] for key in ("logits", "logits_per_image", "last_hidden_state") if key in found)
    weights = torch.randn(output.shape, generator=torch.Generator().manual_seed(3))
    (output * weights).sum().backward()
    for handle in handles:
        handle.remove()
    model.zero_grad()
    gradients = [tensor.grad.detach().flatten() for tensor in entering if tensor.grad is not None]
    return {"output": output.detach(), "gradient": torch.cat(gradients)}


# Loaded weights have other addresses in memory, where some processors add in another order.
ROUNDING = 1e-4  # relative


def difference(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    """Return the largest difference of output and gradients, relative to their largest value."""
    return max(float((a[key] - b[key]).abs().max() / b[key].abs().max()) for key in ("output", "gradient"))


_CHANGES = ("training", "is_filled")


def norms(model: nn.Module) -> dict[str, str]:
    """Return name and all settings (class, shape, eps, C, k, flags) of every swapped norm."""
    # Not their repr, which only the package adds.
    plain = (str, int, float, tuple, type(None))
    found = {name: m for name, m in model.named_modules() if getattr(type(m), "is_adanorm_module", False)}
    shown = {
        name: {k: v for k, v in vars(m).items() if isinstance(v, plain) and k[0] != "_" and k not in _CHANGES}
        for name, m in found.items()
    }
    return {name: f"{type(found[name]).__name__} {dict(sorted(values.items()))}" for name, values in shown.items()}
