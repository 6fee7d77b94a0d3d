"""Tied heads: a norm before one folds into a copy of its weight, and stays untied through saving and loading."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers
from torch import nn

from hf_adanorm import Fold, fold_affine, patch_model
from hf_adanorm.running import dummy_inputs
from tests.zoo.fold_models import build, logits, tied_llama
from tests.zoo.processes import Scripts

transformers.logging.set_verbosity_error()


# name -> (the norm before the head, whether the config can say that it is untied)
TIED = {
    "gpt2-lm": ("transformer.ln_f", True),
    "bert-mlm": ("cls.predictions.transform.LayerNorm", True),
    "t5": ("decoder.final_layer_norm", False),  # its embeddings stay tied to each other
    "mbart": ("model.decoder.layer_norm", False),
}


@pytest.mark.parametrize("name", TIED)
def test_a_tied_head_is_folded_into_once_it_is_untied(name: str, tmp_path: Path) -> None:
    norm, said = TIED[name]
    model = build(name)
    inputs = dummy_inputs(model)
    before = logits(model, inputs)
    embedding = model.get_input_embeddings().weight
    values = embedding.detach().clone()
    report = fold_affine(model, tied="untie")
    assert norm in report.names("folded")
    assert "untied (3," in str(report)
    after = logits(model, inputs)
    torch.testing.assert_close(after, before, rtol=1e-5, atol=1e-5)
    assert torch.equal(embedding, values)
    assert model.config.tie_word_embeddings is not said
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path).eval()
    torch.testing.assert_close(logits(again, inputs), after)


def test_a_head_stays_tied_by_default_and_where_no_norm_folds_into_it() -> None:
    for model, options in ((tied_llama(), {}), (build("bart").float(), {"tied": "untie", "inputs": None})):
        if options:  # a constant: nothing to fold
            last = model.model.decoder.layers[1].final_layer_norm
            nn.init.ones_(last.weight)
            nn.init.zeros_(last.bias)
        fold_affine(model, **options)
        assert model.lm_head.weight is model.get_input_embeddings().weight
        assert model.config.tie_word_embeddings


_STOCK = """
import sys, torch, transformers
folder = sys.argv[1]
saved = torch.load(folder + "/expected.pt")
model = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
torch.set_num_threads(saved["threads"])
with torch.no_grad():
    torch.testing.assert_close(model(**saved["inputs"]).logits, saved["logits"])
assert all(bool((p == 1).all()) for name, p in model.named_parameters() if "norm" in name)
assert [module for name, module in sys.modules.items() if name.startswith("hf_adanorm")] == [None]
print("stock")
"""


def test_a_plain_stock_model_loads_with_stock_transformers_where_we_are_not(
    tmp_path: Path, elsewhere: Scripts
) -> None:
    model = tied_llama()
    report = fold_affine(model, tied="untie")
    assert report.is_stock
    assert "loads without hf_adanorm" in str(report)
    inputs = dummy_inputs(model)
    model.save_pretrained(tmp_path)
    expected = {"inputs": inputs, "logits": logits(model, inputs), "threads": torch.get_num_threads()}
    torch.save(expected, tmp_path / "expected.pt")
    assert elsewhere.run_code(_STOCK, tmp_path).stdout == "stock\n"


def test_resized_embeddings_keep_an_untied_head() -> None:
    model = patch_model(tied_llama(), "layernorm-simple", targets="rmsnorm", affine=Fold(tied="untie"))
    head = model.lm_head.weight[:64].clone()
    model.resize_token_embeddings(64)
    assert torch.equal(model.lm_head.weight, head)
    assert not torch.equal(model.lm_head.weight, model.get_input_embeddings().weight)
