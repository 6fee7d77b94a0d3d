"""A small BERT that classifies, without dropout, and batches for it."""

import torch
from transformers import BertConfig, BertForSequenceClassification

from hf_adanorm import patch_model


def bert(norm: str = "layernorm", **options) -> BertForSequenceClassification:
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=50,
        hidden_size=16,
        num_hidden_layers=3,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=16,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    model = BertForSequenceClassification(config)
    return model if norm == "layernorm" else patch_model(model, norm, **options)


def batch(seed: int = 0, size: int = 4) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        "input_ids": torch.randint(0, 50, (size, 8), generator=generator),
        "labels": torch.randint(0, 2, (size,), generator=generator),
    }
