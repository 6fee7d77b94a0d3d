"""Tiny models of many architectures with random gains and biases, and the tables of what folds in each.

python tests/zoo/fold_models.py            prints the tables (Markdown)
"""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from hf_adanorm import fold_affine, patch_model
from hf_adanorm.detection import iter_norms
from hf_adanorm.running import dummy_inputs

POST_NORM = {"bert-cls": 4, "roberta-cls": 5, "bart": 10, "marian": 8}  # name -> approximated norms
SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
VOCAB = {"vocab_size": 100}
IMAGE = {"image_size": 32, "patch_size": 8}
SEQ2SEQ = {
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 64,
    "decoder_ffn_dim": 64,
    "vocab_size": 100,
    "max_position_embeddings": 64,
}
SPECIAL = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}

MODELS: dict[str, Callable[[], nn.Module]] = {
    "gpt2-seqcls": lambda: transformers.GPT2ForSequenceClassification(
        transformers.GPT2Config(n_embd=32, n_layer=2, n_head=2, n_positions=64, **VOCAB, **SPECIAL)
    ),
    "gpt2-lm untied": lambda: transformers.GPT2LMHeadModel(
        transformers.GPT2Config(
            n_embd=32, n_layer=2, n_head=2, n_positions=64, tie_word_embeddings=False, **VOCAB, **SPECIAL
        )
    ),
    "gpt2-lm": lambda: transformers.GPT2LMHeadModel(
        transformers.GPT2Config(n_embd=32, n_layer=2, n_head=2, n_positions=64, **VOCAB, **SPECIAL)
    ),
    "opt": lambda: transformers.OPTForCausalLM(
        transformers.OPTConfig(
            **{k: v for k, v in SIZES.items() if k != "intermediate_size"},
            ffn_dim=64,
            word_embed_proj_dim=32,
            max_position_embeddings=64,
            **VOCAB,
            **SPECIAL,
        )
    ),
    "gpt_neox": lambda: transformers.GPTNeoXForCausalLM(
        transformers.GPTNeoXConfig(**SIZES, **VOCAB, max_position_embeddings=64, **SPECIAL)
    ),
    "gpt_neo": lambda: transformers.GPTNeoForCausalLM(
        transformers.GPTNeoConfig(
            hidden_size=32,
            num_layers=2,
            num_heads=2,
            attention_types=[[["global", "local"], 1]],
            max_position_embeddings=64,
            **VOCAB,
            **SPECIAL,
        )
    ),
    "gptj": lambda: transformers.GPTJForCausalLM(
        transformers.GPTJConfig(
            n_embd=32, n_layer=2, n_head=2, n_positions=64, rotary_dim=8, tie_word_embeddings=False, **VOCAB, **SPECIAL
        )
    ),
    "bloom": lambda: transformers.BloomForCausalLM(
        transformers.BloomConfig(hidden_size=32, n_layer=2, n_head=2, **VOCAB, **SPECIAL)
    ),
    "falcon": lambda: transformers.FalconForCausalLM(
        transformers.FalconConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, **VOCAB, **SPECIAL)
    ),
    "phi": lambda: transformers.PhiForCausalLM(transformers.PhiConfig(**SIZES, **VOCAB, **SPECIAL)),
    "mpt": lambda: transformers.MptForCausalLM(
        transformers.MptConfig(d_model=32, n_heads=2, n_layers=2, max_seq_len=64, **VOCAB)
    ),
    "codegen": lambda: transformers.CodeGenForCausalLM(
        transformers.CodeGenConfig(n_embd=32, n_layer=2, n_head=4, n_positions=64, rotary_dim=4, **VOCAB, **SPECIAL)
    ),
    "biogpt": lambda: transformers.BioGptForCausalLM(
        transformers.BioGptConfig(**SIZES, **VOCAB, **SPECIAL, max_position_embeddings=64)
    ),
    "stablelm": lambda: transformers.StableLmForCausalLM(
        transformers.StableLmConfig(**SIZES, num_key_value_heads=2, **VOCAB, **SPECIAL)
    ),
    "starcoder2": lambda: transformers.Starcoder2ForCausalLM(
        transformers.Starcoder2Config(**SIZES, num_key_value_heads=2, **VOCAB, **SPECIAL)
    ),
    "bert-cls": lambda: transformers.BertForSequenceClassification(transformers.BertConfig(**SIZES, **VOCAB)),
    "bert-mlm": lambda: transformers.BertForMaskedLM(transformers.BertConfig(**SIZES, **VOCAB)),
    "roberta-cls": lambda: transformers.RobertaForSequenceClassification(
        transformers.RobertaConfig(
            **SIZES, **VOCAB, max_position_embeddings=64, pad_token_id=1, bos_token_id=0, eos_token_id=2
        )
    ),
    "distilbert": lambda: transformers.DistilBertForSequenceClassification(
        transformers.DistilBertConfig(dim=32, n_layers=2, n_heads=2, hidden_dim=64, **VOCAB)
    ),
    "albert": lambda: transformers.AlbertForSequenceClassification(
        transformers.AlbertConfig(embedding_size=16, **SIZES, **VOCAB)
    ),
    "electra": lambda: transformers.ElectraForSequenceClassification(
        transformers.ElectraConfig(embedding_size=16, **SIZES, **VOCAB)
    ),
    "deberta": lambda: transformers.DebertaV2ForSequenceClassification(
        transformers.DebertaV2Config(**SIZES, **VOCAB, pooler_hidden_size=32)
    ),
    "esm": lambda: transformers.EsmForMaskedLM(
        transformers.EsmConfig(**SIZES, **VOCAB, max_position_embeddings=64, pad_token_id=1, mask_token_id=3)
    ),
    "modernbert": lambda: transformers.ModernBertForSequenceClassification(
        transformers.ModernBertConfig(**SIZES, **VOCAB, **SPECIAL, cls_token_id=1, sep_token_id=2)
    ),
    "vit": lambda: transformers.ViTForImageClassification(transformers.ViTConfig(**SIZES, **IMAGE)),
    "deit": lambda: transformers.DeiTForImageClassification(transformers.DeiTConfig(**SIZES, **IMAGE)),
    "beit": lambda: transformers.BeitForImageClassification(transformers.BeitConfig(**SIZES, **IMAGE)),
    "dinov2": lambda: transformers.Dinov2ForImageClassification(
        transformers.Dinov2Config(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, **IMAGE)
    ),
    "swin": lambda: transformers.SwinForImageClassification(
        transformers.SwinConfig(
            image_size=32, patch_size=4, embed_dim=16, depths=[1, 1], num_heads=[2, 2], window_size=4
        )
    ),
    "swinv2": lambda: transformers.Swinv2ForImageClassification(
        transformers.Swinv2Config(
            image_size=32, patch_size=4, embed_dim=16, depths=[1, 1], num_heads=[2, 2], window_size=4
        )
    ),
    "convnext": lambda: transformers.ConvNextForImageClassification(
        transformers.ConvNextConfig(image_size=32, hidden_sizes=[8, 16, 16, 32], depths=[1, 1, 1, 1])
    ),
    "segformer": lambda: transformers.SegformerForSemanticSegmentation(
        transformers.SegformerConfig(
            image_size=64,
            hidden_sizes=[8, 16, 16, 32],
            depths=[1, 1, 1, 1],
            num_attention_heads=[1, 2, 2, 2],
            decoder_hidden_size=32,
        )
    ),
    "clip": lambda: transformers.CLIPModel(
        transformers.CLIPConfig(
            text_config=dict(**SIZES, vocab_size=100, bos_token_id=1, eos_token_id=2),
            vision_config=dict(**SIZES, **IMAGE),
        )
    ),
    "siglip": lambda: transformers.SiglipModel(
        transformers.SiglipConfig(
            text_config=dict(**SIZES, vocab_size=100, bos_token_id=1, eos_token_id=2),
            vision_config=dict(**SIZES, **IMAGE),
        )
    ),
    "whisper": lambda: transformers.WhisperForConditionalGeneration(
        transformers.WhisperConfig(
            **{**SEQ2SEQ, "max_position_embeddings": 64},
            max_source_positions=30,
            max_target_positions=40,
            num_mel_bins=16,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=2,
            decoder_start_token_id=1,
            suppress_tokens=None,
            begin_suppress_tokens=None,
        )
    ),
    "wav2vec2": lambda: transformers.Wav2Vec2ForCTC(
        transformers.Wav2Vec2Config(
            **SIZES,
            conv_dim=(16, 16, 16),
            conv_stride=(5, 4, 4),
            conv_kernel=(10, 8, 4),
            num_conv_pos_embeddings=16,
            num_conv_pos_embedding_groups=2,
            vocab_size=32,
            do_stable_layer_norm=True,
            feat_extract_norm="layer",
        )
    ),
    "hubert": lambda: transformers.HubertForCTC(
        transformers.HubertConfig(
            **SIZES,
            conv_dim=(16, 16, 16),
            conv_stride=(5, 4, 4),
            conv_kernel=(10, 8, 4),
            num_conv_pos_embeddings=16,
            num_conv_pos_embedding_groups=2,
            vocab_size=32,
        )
    ),
    "mbart": lambda: transformers.MBartForConditionalGeneration(transformers.MBartConfig(**SEQ2SEQ, **SPECIAL)),
    "pegasus": lambda: transformers.PegasusForConditionalGeneration(
        transformers.PegasusConfig(**SEQ2SEQ, pad_token_id=0, eos_token_id=1)
    ),
    "m2m100": lambda: transformers.M2M100ForConditionalGeneration(transformers.M2M100Config(**SEQ2SEQ, **SPECIAL)),
    "bart": lambda: transformers.BartForConditionalGeneration(transformers.BartConfig(**SEQ2SEQ, **SPECIAL)),
    "bart-cls": lambda: transformers.BartForSequenceClassification(transformers.BartConfig(**SEQ2SEQ, **SPECIAL)),
    "marian": lambda: transformers.MarianMTModel(
        transformers.MarianConfig(**SEQ2SEQ, **SPECIAL, decoder_start_token_id=0)
    ),
    "blenderbot": lambda: transformers.BlenderbotForConditionalGeneration(
        transformers.BlenderbotConfig(**SEQ2SEQ, **SPECIAL)
    ),
    "t5": lambda: transformers.T5ForConditionalGeneration(
        transformers.T5Config(
            d_model=32, d_kv=16, d_ff=64, num_layers=2, num_heads=2, **VOCAB, decoder_start_token_id=0
        )
    ),
    "llama": lambda: transformers.LlamaForCausalLM(
        transformers.LlamaConfig(**SIZES, num_key_value_heads=2, **VOCAB, **SPECIAL)
    ),
    "mixtral": lambda: transformers.MixtralForCausalLM(
        transformers.MixtralConfig(**SIZES, num_key_value_heads=2, num_local_experts=4, **VOCAB, **SPECIAL)
    ),
    "olmo": lambda: transformers.OlmoForCausalLM(
        transformers.OlmoConfig(
            **SIZES, num_key_value_heads=2, **VOCAB, pad_token_id=0, bos_token_id=1, eos_token_id=2
        )
    ),
    "vit-mae": lambda: transformers.ViTMAEForPreTraining(
        transformers.ViTMAEConfig(
            **SIZES,
            **IMAGE,
            decoder_hidden_size=32,
            decoder_num_hidden_layers=1,
            decoder_num_attention_heads=2,
            decoder_intermediate_size=64,
        )
    ),
    "layoutlm": lambda: transformers.LayoutLMForSequenceClassification(transformers.LayoutLMConfig(**SIZES, **VOCAB)),
    "w2v-bert": lambda: transformers.Wav2Vec2BertModel(
        transformers.Wav2Vec2BertConfig(
            **SIZES,
            feature_projection_input_dim=16,
            vocab_size=32,
            conv_depthwise_kernel_size=3,
            left_max_position_embeddings=8,
            right_max_position_embeddings=4,
        )
    ),
    "videomae": lambda: transformers.VideoMAEForVideoClassification(
        transformers.VideoMAEConfig(**SIZES, **IMAGE, num_frames=4, tubelet_size=2)
    ),
    "vilt": lambda: transformers.ViltModel(transformers.ViltConfig(**SIZES, **IMAGE, vocab_size=50)),
    "audio-spectrogram": lambda: transformers.ASTForAudioClassification(
        transformers.ASTConfig(**SIZES, max_length=64, num_mel_bins=32, patch_size=16)
    ),
}


def build(name: str, *, constant: bool = False, seed: int = 0) -> nn.Module:
    """The model in evaluation mode, its gains in 0.5..1.5 (`constant`: one number a norm), no bias at zero."""
    torch.manual_seed(seed)
    model = MODELS[name]().eval()
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


def folding_table() -> None:
    print('| architecture | norms | folded | kept (why) | approximated with "approximate" | largest difference |')
    print("|---|---|---|---|---|---|")
    for name in MODELS:
        model = build(name)
        names = [norm for norm, _, info in iter_norms(model) if info.kind != "other"]
        report = fold_affine(model)
        again = fold_affine(build(name), on_unfoldable="approximate")
        reasons = Counter(
            "tied head" if "tied" in norm.reason else norm.reason.split(" in ")[0].split(" (")[0]
            for norm in report.norms
            if norm.action == "kept"
        )
        why = "; ".join(f"{count} {reason}" for reason, count in reasons.items())
        print(
            f"| {name} | {len(names)} | {len(report.names('folded'))} | {why} "
            f"| {len(again.names('approximated'))} | {report.difference:.0e} |"
        )


def post_norm_table() -> None:
    """How far the logits of post-norm models move by layernorm-simple, over three draws of gains and biases."""
    ways = {
        "dropped": {},
        "approximate": {"affine": "fold", "on_unfoldable": "approximate"},
        "approximate, each gain one number": {"affine": "fold", "on_unfoldable": "approximate"},
    }
    print(f"| architecture | {' | '.join(ways)} |")
    print("|---|" + "---|" * len(ways))
    for name in POST_NORM:
        cells = []
        for way, options in ways.items():
            moved = []
            for seed in range(3):
                model = build(name, constant=way.endswith("one number"), seed=seed)
                inputs = dummy_inputs(model)
                before = logits(model, inputs)
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")  # the outputs do change: that is the table
                    patch_model(model, "layernorm-simple", **options)
                moved.append(float((logits(model, inputs) - before).norm() / before.norm()))
            cells.append(f"{min(moved):.2g} to {max(moved):.2g}")
        print(f"| {name} | {' | '.join(cells)} |")


if __name__ == "__main__":
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(1)
    folding_table()
    print()
    post_norm_table()
