"""Tiny models of many architectures with random gains and biases."""

from __future__ import annotations

import copy
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from hf_adanorm.detection import iter_norms

POST_NORM = {"bert-cls": 4, "roberta-cls": 5, "bart": 10, "marian": 8}  # name -> approximated norms
VOCAB = {"vocab_size": 100}
SPECIAL = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
LAYERS = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
SIZES = {**LAYERS, "intermediate_size": 64}
ENCODER = {**SIZES, **VOCAB}
DECODER = {**ENCODER, **SPECIAL}
GROUPED = {**DECODER, "num_key_value_heads": 2}
GPT = {"n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 64, **VOCAB, **SPECIAL}
IMAGE = {"image_size": 32, "patch_size": 8}
VISION = {**SIZES, **IMAGE}
STAGES = {"hidden_sizes": [8, 16, 16, 32], "depths": [1, 1, 1, 1]}
WINDOWS = {"image_size": 32, "patch_size": 4, "embed_dim": 16, "depths": [1, 1], "num_heads": [2, 2], "window_size": 4}
TOWERS = {"text_config": {**ENCODER, "bos_token_id": 1, "eos_token_id": 2}, "vision_config": VISION}
SEQ2SEQ = {
    **{f"{part}_{key}": 2 for part in ("encoder", "decoder") for key in ("layers", "attention_heads")},
    "d_model": 32,
    "encoder_ffn_dim": 64,
    "decoder_ffn_dim": 64,
    "max_position_embeddings": 64,
    **VOCAB,
    **SPECIAL,
}

# name -> (class of transformers, the fields of its config)
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "gpt2-lm untied": ("GPT2LMHeadModel", {**GPT, "tie_word_embeddings": False}),
    "gpt2-lm": ("GPT2LMHeadModel", GPT),
    "opt": (
        "OPTForCausalLM",
        {**LAYERS, **VOCAB, **SPECIAL, "ffn_dim": 64, "word_embed_proj_dim": 32, "max_position_embeddings": 64},
    ),
    "gpt_neox": ("GPTNeoXForCausalLM", {**DECODER, "max_position_embeddings": 64}),
    "gptj": ("GPTJForCausalLM", {**GPT, "rotary_dim": 8, "tie_word_embeddings": False}),
    "stablelm": ("StableLmForCausalLM", GROUPED),
    "bert-cls": ("BertForSequenceClassification", ENCODER),
    "bert-mlm": ("BertForMaskedLM", ENCODER),
    "roberta-cls": (
        "RobertaForSequenceClassification",
        {**ENCODER, "max_position_embeddings": 64, "pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 2},
    ),
    "esm": ("EsmForMaskedLM", {**ENCODER, "max_position_embeddings": 64, "pad_token_id": 1, "mask_token_id": 3}),
    "vit": ("ViTForImageClassification", VISION),
    "dinov2": ("Dinov2ForImageClassification", {**LAYERS, **IMAGE}),
    "swin": ("SwinForImageClassification", WINDOWS),
    "convnext": ("ConvNextForImageClassification", {**STAGES, "image_size": 32}),
    "segformer": (
        "SegformerForSemanticSegmentation",
        {**STAGES, "image_size": 64, "num_attention_heads": [1, 2, 2, 2], "decoder_hidden_size": 32},
    ),
    "clip": ("CLIPModel", TOWERS),
    "whisper": (
        "WhisperForConditionalGeneration",
        {
            **SEQ2SEQ,
            "max_source_positions": 30,
            "max_target_positions": 40,
            "num_mel_bins": 16,
            "decoder_start_token_id": 1,
            "suppress_tokens": None,
            "begin_suppress_tokens": None,
        },
    ),
    "mbart": ("MBartForConditionalGeneration", SEQ2SEQ),
    "pegasus": ("PegasusForConditionalGeneration", {**SEQ2SEQ, "bos_token_id": None, "eos_token_id": 1}),
    "m2m100": ("M2M100ForConditionalGeneration", SEQ2SEQ),
    "bart": ("BartForConditionalGeneration", SEQ2SEQ),
    "marian": ("MarianMTModel", {**SEQ2SEQ, "decoder_start_token_id": 0}),
    "t5": (
        "T5ForConditionalGeneration",
        {"d_model": 32, "d_kv": 16, "d_ff": 64, "num_layers": 2, "num_heads": 2, **VOCAB, "decoder_start_token_id": 0},
    ),
    "llama": ("LlamaForCausalLM", GROUPED),
    "gemma": ("GemmaForCausalLM", {**GROUPED, "head_dim": 16}),
    "olmo": ("OlmoForCausalLM", GROUPED),
    "w2v-bert": (
        "Wav2Vec2BertModel",
        {
            **SIZES,
            "feature_projection_input_dim": 16,
            "vocab_size": 32,
            "conv_depthwise_kernel_size": 3,
            "left_max_position_embeddings": 8,
            "right_max_position_embeddings": 4,
        },
    ),
    "videomae": ("VideoMAEForVideoClassification", {**VISION, "num_frames": 4, "tubelet_size": 2}),
    "vilt": ("ViltModel", {**VISION, "vocab_size": 50}),
}


def build(name: str, *, constant: bool = False, seed: int = 0) -> nn.Module:
    """The model in evaluation mode, its gains in 0.5..1.5 (`constant`: one number a norm), no bias at zero."""
    torch.manual_seed(seed)
    cls, fields = getattr(transformers, MODELS[name][0]), copy.deepcopy(MODELS[name][1])
    model = cls(cls.config_class(**fields)).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for _, module, info in iter_norms(model):
            if info.gain_name:
                gain = getattr(module, info.gain_name)
                value = 0.5 + torch.rand(gain.shape, generator=generator)
                gain.copy_((value.flatten()[0] if constant else value) - info.gain_offset)
            if info.bias_name:
                bias = getattr(module, info.bias_name)
                bias.copy_(torch.rand(bias.shape, generator=generator) - 0.5)
        for key, parameter in model.named_parameters():
            if key.endswith("bias") and not bool(parameter.any()):
                parameter.normal_(0, 0.1, generator=generator)
    return model


def tied_llama() -> nn.Module:
    """LLaMA as SmolLM2 is: its head is the embedding."""
    config = transformers.LlamaConfig(**SIZES, **SPECIAL, **VOCAB, tie_word_embeddings=True)
    model = transformers.LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.uniform_(0.5, 1.5)
    return model


def logits(model: nn.Module, inputs: dict[str, Any]) -> Tensor:
    with torch.no_grad():
        output = model(**inputs)
    if isinstance(output, Tensor):
        return output
    return output["logits"] if "logits" in output else output["logits_per_image"]
