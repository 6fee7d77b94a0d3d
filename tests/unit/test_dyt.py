"""DyT, a norm that the traveling file alone knows: all else finds it there."""

from __future__ import annotations

import copy
import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoModelForMaskedLM, EncoderDecoderModel, Trainer, TrainingArguments

from hf_adanorm import inspect_model, patch_model, unpatch_model, watch_norms
from hf_adanorm.modeling_adanorm import DyT
from tests.zoo.processes import Scripts
from tests.zoo.round_trip import build, inputs


def patched(case: str = "bert") -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # gain and bias are not dropped
        return patch_model(build(case), "dyt")


def trained(model: Any) -> Any:
    """After a step, so that alpha, gain and bias are no longer those of the start."""
    model.train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model(**inputs("bert")).logits.square().mean().backward()
    optimizer.step()
    return model.eval()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_value_and_gradients_are_the_papers(dtype: torch.dtype) -> None:
    norm = DyT(6, dtype=torch.float64)
    for parameter in norm.parameters():
        nn.init.uniform_(parameter)
    x, dz = torch.randn(4, 6, dtype=torch.float64, requires_grad=True), torch.randn(4, 6, dtype=torch.float64)
    expected = norm.dyt_gain * torch.tanh(norm.dyt_alpha * x) + norm.dyt_bias
    exact = torch.autograd.grad(expected, [x, *norm.parameters()], dz)
    low, rough = norm.to(dtype), x.detach().to(dtype).requires_grad_()
    z = low(rough)
    found = torch.autograd.grad(z, [rough, *low.parameters()], dz.to(dtype))
    tolerance = {torch.float64: 1e-9, torch.float32: 1e-5, torch.bfloat16: 3e-2}[dtype]
    assert z.dtype == dtype
    for a, b in zip([z, *found], [expected, *exact], strict=True):
        torch.testing.assert_close(a.double(), b, rtol=tolerance, atol=tolerance)


def test_it_starts_from_gain_and_bias_of_the_norm_that_it_replaces_and_gives_them_back() -> None:
    stock, model = build("bert"), patched()
    source, norm = (m.bert.encoder.layer[1].output.LayerNorm for m in (stock, model))
    assert torch.equal(norm.dyt_gain, source.weight)
    assert torch.equal(norm.dyt_bias, source.bias)
    assert norm.dyt_alpha.tolist() == [0.5]
    assert {name for name, _ in norm.named_parameters()} == {"dyt_gain", "dyt_bias", "dyt_alpha"}
    learned = trained(model).bert.encoder.layer[1].output.LayerNorm.dyt_gain.detach().clone()
    unpatch_model(model)
    assert torch.equal(model.bert.encoder.layer[1].output.LayerNorm.weight, learned)


def test_an_rmsnorm_without_bias_and_channels_first() -> None:
    model = patch_model(nn.Sequential(nn.Linear(4, 4), nn.RMSNorm(4)), "dyt", targets="rmsnorm")
    assert model[1].dyt_bias.tolist() == [0.0] * 4
    x = torch.randn(2, 4, 3)
    torch.testing.assert_close(DyT(4, channels_first=True)(x), torch.tanh(0.5 * x))


def test_a_second_call_keeps_what_was_learned() -> None:
    model = trained(patched())
    before = model.state_dict()
    patch_model(model, "dyt", eps=1e-3)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_it_saves_and_reloads_and_then_unpatches_to_what_it_learned(tmp_path: Path) -> None:
    model = trained(patched())
    model.save_pretrained(tmp_path)
    again, info = AutoModelForMaskedLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values()), info
    torch.testing.assert_close(again(**inputs("bert")).logits, model(**inputs("bert")).logits)
    assert again.config.adanorm["groups"][0]["norm"] == "dyt"
    learned = again.bert.encoder.layer[0].output.LayerNorm.dyt_gain.detach().clone()
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # nothing is lost
        unpatch_model(again)
    assert torch.equal(again.bert.encoder.layer[0].output.LayerNorm.weight, learned)


def test_its_values_survive_that_a_copy_becomes_part_of_another_model(tmp_path: Path) -> None:
    trained(patched()).save_pretrained(tmp_path)
    loaded = AutoModelForMaskedLM.from_pretrained(tmp_path).bert
    learned = {name: tensor.clone() for name, tensor in loaded.state_dict().items()}
    for part in (copy.deepcopy(loaded), loaded.bfloat16().float()):
        decoder = copy.deepcopy(part)
        decoder.config.is_decoder = decoder.config.add_cross_attention = True
        EncoderDecoderModel(encoder=part, decoder=decoder)
        kept = part.state_dict()
        assert all(torch.equal(kept[name].bfloat16(), learned[name].bfloat16()) for name in learned)


@pytest.mark.parametrize("norm", ["adanorm", "none"])
def test_what_it_has_learned_is_not_dropped_without_a_word(norm: Any) -> None:
    with pytest.warns(UserWarning, match="trained gains and biases of 6 norms are dropped"):
        patch_model(trained(patched()), norm)


def test_what_it_has_learned_is_not_folded_as_that_of_a_norm() -> None:
    model = trained(patched())
    before = {name: type(module) for name, module in model.named_modules()}
    with pytest.raises(ValueError, match="a dyt with a gain and bias: unpatch_model"):
        patch_model(model, "layernorm-simple", affine="fold")
    assert {name: type(module) for name, module in model.named_modules()} == before


def test_a_frozen_model_stays_frozen() -> None:
    model = patch_model(build("bert").requires_grad_(False), "dyt")
    assert not any(parameter.requires_grad for parameter in model.parameters())


def test_trainer_decays_it_as_little_as_a_norm(tmp_path: Path) -> None:
    model = patch_model(build("gpt2"), "dyt")
    decayed = Trainer(model, TrainingArguments(str(tmp_path), use_cpu=True)).get_decay_parameter_names(model)
    assert decayed
    assert not [name for name in decayed if "dyt" in name]


WITHOUT = """
import json, sys
import torch
from transformers import AutoModelForMaskedLM
folder, ids = sys.argv[1], torch.arange(8)[None]
try:
    AutoModelForMaskedLM.from_pretrained(folder)
    error = None
except RuntimeError as raised:
    error = str(raised)
model, info = AutoModelForMaskedLM.from_pretrained(folder, trust_remote_code=True, output_loading_info=True)
deeper = AutoModelForMaskedLM.from_pretrained(folder, trust_remote_code=True, num_hidden_layers=3)
print(json.dumps({
    "error": error, "info": {key: list(value) for key, value in info.items()},
    "sum": model.eval()(ids).logits.double().sum().item(),
    "new": [deeper.bert.encoder.layer[2].output.LayerNorm.get_parameter("dyt_" + key).unique().tolist()
            for key in ("gain", "bias", "alpha")],
}))
"""


def test_without_the_package_it_loads_by_trust_and_raises_otherwise(tmp_path: Path, elsewhere: Scripts) -> None:
    model = trained(patched())
    model.save_pretrained(tmp_path)
    found = json.loads(elsewhere.run_code(WITHOUT, tmp_path).stdout.splitlines()[-1])
    assert "mismatch" in found["error"]
    assert not any(found["info"].values())
    assert found["sum"] == pytest.approx(model(torch.arange(8)[None]).logits.double().sum().item(), rel=1e-6)
    assert found["new"] == [[1.0], [0.0], [0.5]]


def test_it_does_not_fold() -> None:
    with pytest.raises(ValueError, match='affine="fold" does not go with norm="dyt"'):
        patch_model(build("bert"), "dyt", affine="fold")


def test_reports_and_watching_know_it() -> None:
    model = patched()
    report = inspect_model(model)
    assert report.num_removed_parameters == 0
    assert "DyT((32,)" in str(report)
    with watch_norms(model) as log:
        model.train()(**inputs("bert")).logits.sum().backward()
    assert {record.norm for record in log.records} == {"dyt"}
