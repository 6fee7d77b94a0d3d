"""What a swapped norm gives back: learned gains, and the dtype of the norm that it replaced."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers import BertForMaskedLM

from hf_adanorm import Fold, is_patched, patch_model, unpatch_model
from tests.zoo.round_trip import build

IDS = torch.arange(8)[None]


def last(model: Any) -> Any:
    return model.bert.encoder.layer[1].output.LayerNorm


def test_learned_gains_come_back_also_those_of_another_state_dict() -> None:
    model, other = patch_model(build("bert"), "dyt"), patch_model(build("bert"), "dyt")
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(0.25)
    model.load_state_dict(other.state_dict())
    expected = last(model).dyt_gain.detach().clone()
    assert torch.equal(last(unpatch_model(model)).weight, expected)
    assert torch.equal(expected, last(build("bert")).weight + 0.25)


def test_an_untied_head_is_saved_after_its_embeddings_were_resized(tmp_path: Path) -> None:
    model = patch_model(build("bert"), "layernorm-simple", affine=Fold(tied="untie", unfoldable="approximate"))
    before = model(IDS).logits
    model.resize_token_embeddings(120)
    model.save_pretrained(tmp_path)
    again = BertForMaskedLM.from_pretrained(tmp_path).eval()
    torch.testing.assert_close(again(IDS).logits[..., :99], before)


@pytest.mark.parametrize("family", ["T5", "MT5", "UMT5", "Pop2Piano"])
def test_a_t5_in_float16_gets_the_dtypes_that_its_stock_norms_return(family: str, tmp_path: Path) -> None:
    sizes = {"vocab_size": 32, "d_model": 16, "d_kv": 8, "d_ff": 16, "num_layers": 2, "num_heads": 2}
    tokens = {"pad_token_id": 0, "decoder_start_token_id": 0, "eos_token_id": 1}
    cls = getattr(transformers, f"{family}ForConditionalGeneration")
    cls(getattr(transformers, f"{family}Config")(**sizes, **tokens)).save_pretrained(tmp_path / "stock")

    def dtypes(model: Any) -> list[torch.dtype]:
        """Return the dtypes of the logits and of every norm's output."""
        found: list[torch.dtype] = []
        for name, module in model.named_modules():
            if name.endswith("layer_norm"):
                module.register_forward_hook(lambda module, args, output: found.append(output.dtype))
        return [model(input_ids=IDS, decoder_input_ids=IDS).logits.dtype, *found]

    model = cls.from_pretrained(tmp_path / "stock", dtype=torch.float16)
    assert {p.dtype for n, p in model.named_parameters() if n.endswith("wo.weight")} == {torch.float32}
    expected = dtypes(model)
    assert is_patched(patch_model(model))
    assert dtypes(model) == expected
    model.save_pretrained(tmp_path / "patched")
    assert dtypes(cls.from_pretrained(tmp_path / "patched", dtype=torch.float16)) == expected
