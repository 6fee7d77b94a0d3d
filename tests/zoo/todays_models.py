"""The model types that people use most today, as tiny models, with what is special about the norms of each."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import PreTrainedModel

from tests.zoo import tiny_inputs


@dataclass(frozen=True)
class Today:
    """One model type: its class, and how many of its norms `targets="auto"` swaps, skips, and a fold folds exactly."""

    model_class: str
    swapped: int
    skipped: int
    folded: int


TODAY = {
    "qwen3": Today("Qwen3ForCausalLM", 5, 4, 5),
    "qwen3_moe": Today("Qwen3MoeForCausalLM", 5, 4, 3),
    "qwen3_next": Today("Qwen3NextForCausalLM", 5, 3, 3),
    "qwen2_5_vl": Today("Qwen2_5_VLForConditionalGeneration", 10, 0, 10),
    "llama": Today("LlamaForCausalLM", 5, 0, 5),
    "llama4_text": Today("Llama4ForCausalLM", 5, 2, 3),
    "gemma3_text": Today("Gemma3ForCausalLM", 9, 4, 4),
    "gemma3n_text": Today("Gemma3nForCausalLM", 16, 6, 4),
    "mistral": Today("MistralForCausalLM", 5, 0, 5),
    "phi3": Today("Phi3ForCausalLM", 5, 0, 5),
    "deepseek_v3": Today("DeepseekV3ForCausalLM", 5, 4, 8),
    "gpt_oss": Today("GptOssForCausalLM", 5, 0, 3),
    "olmo2": Today("Olmo2ForCausalLM", 5, 4, 1),
    "olmo3": Today("Olmo3ForCausalLM", 5, 4, 1),
    "smollm3": Today("SmolLM3ForCausalLM", 5, 0, 4),
    "glm4": Today("Glm4ForCausalLM", 9, 0, 5),
    "granite": Today("GraniteForCausalLM", 5, 0, 5),
    "modernbert": Today("ModernBertForMaskedLM", 6, 0, 4),
    "dinov3_vit": Today("DINOv3ViTModel", 5, 0, 4),
    "siglip2": Today("Siglip2Model", 11, 0, 10),
    "whisper": Today("WhisperForConditionalGeneration", 12, 0, 11),
    "t5gemma": Today("T5GemmaForConditionalGeneration", 22, 0, 11),
}


def build(model_type: str) -> tuple[PreTrainedModel, dict[str, Any]]:
    """Return a tiny random model in evaluation mode and inputs for its forward."""
    return tiny_inputs.runnable(model_type, getattr(transformers, TODAY[model_type].model_class))


def output(model: nn.Module, inputs: dict[str, Any]) -> Tensor:
    """Return what the model computes for its task: logits, or hidden states of a model without a head."""
    names = ("logits", "logits_per_image", "last_hidden_state")
    torch.manual_seed(0)
    with torch.no_grad():
        found = model(**inputs)
    return found[next(name for name in names if name in found)]
