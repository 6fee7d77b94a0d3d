"""The smallest models that the recipes can train."""

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from hf_adanorm import patch_model

TINY_CLASSIFIER = {"model_type": "bert", "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
TINY_CLASSIFIER |= {"intermediate_size": 16, "max_position_embeddings": 32}
TINY_TRANSLATOR = {"model_type": "m2m_100", "d_model": 16, "max_position_embeddings": 32}
TINY_TRANSLATOR |= {
    f"{part}_{name}": value
    for name, value in {"layers": 1, "ffn_dim": 16, "attention_heads": 2, "layerdrop": 0.0}.items()
    for part in ("encoder", "decoder")
}
TINY_DECODER = {"model_type": "gpt2", "n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 16}
TINY_PARSER = {"model_type": "transition_parser", "embedding_size": 4, "hidden_size": 8}
TINY_TRANSFORMER_XL = {"model_type": "xlnet", "attn_type": "uni", "bi_data": False, "mem_len": 16, "dropout": 0.0}
TINY_TRANSFORMER_XL |= {"d_model": 16, "n_layer": 1, "n_head": 2, "d_inner": 16}


def transformer_xl() -> PreTrainedModel:
    """Two patched layers with a memory of 128, their weights far from those of a fresh model."""
    torch.manual_seed(0)
    sizes = {"n_layer": 2, "mem_len": 128, "vocab_size": 256}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**{**TINY_TRANSFORMER_XL, **sizes}))
    patch_model(model, "adanorm")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model.eval()
