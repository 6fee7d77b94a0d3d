"""PEFT on patched models, and adapters that remember the norms of their base."""

from __future__ import annotations

import copy
import json
import pickle
import sys
import warnings
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from packaging.version import Version
from peft import LNTuningConfig, LoraConfig, PeftModel, PromptTuningConfig, get_peft_model
from torch import nn
from transformers import AutoModelForMaskedLM, AutoModelForSequenceClassification, PreTrainedModel
from transformers.integrations.peft import MIN_PEFT_VERSION

from hf_adanorm import fold_affine, is_patched, patch_model, unpatch_model
from hf_adanorm.modeling_adanorm import ADDED_BIAS, ADJUSTED_EPS
from hf_adanorm.saving import install
from hf_adanorm.saving.spec import resolved_spec
from hf_adanorm.saving.wrapping import _FINDER
from tests.zoo import fold_models
from tests.zoo.round_trip import ROUNDING, SWAPS, build, difference, inputs, norms, run

pytestmark = pytest.mark.filterwarnings("ignore:the trained gains and biases:UserWarning")

LORA = {"r": 4, "target_modules": ["query", "value"], "init_lora_weights": False}
HOLE = "saved without its base"


def base(swap: str = "adanorm") -> PreTrainedModel:
    return patch_model(build("bert"), **SWAPS[swap])


@pytest.fixture
def saved_base(tmp_path: Path) -> Path:
    base().save_pretrained(tmp_path / "base")
    return tmp_path / "base"


@pytest.fixture
def stray(tmp_path: Path) -> Path:
    """Return an adapter whose base was patched in memory."""
    with pytest.warns(UserWarning, match=HOLE):
        get_peft_model(base(), LoraConfig(**LORA)).save_pretrained(tmp_path / "stray")
    return tmp_path / "stray"


def load(folder: Path) -> Any:
    return AutoModelForMaskedLM.from_pretrained(folder)


# ---------------------------------------------------------------------------------------------- LoRA as it should work


def test_lora_trains_on_a_patched_model() -> None:
    model = get_peft_model(base(), LoraConfig(r=4, target_modules=["query", "value"]))
    batch = inputs("bert")
    loss = model(**batch, labels=batch["input_ids"]).loss
    loss.backward()
    gradients = {name for name, p in model.named_parameters() if p.grad is not None and bool(p.grad.any())}
    assert gradients == {name for name, _ in model.named_parameters() if "lora_B" in name}
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    optimizer.step()
    assert model(**batch, labels=batch["input_ids"]).loss < loss


def test_adapter_of_a_saved_base_goes_and_comes_back_in_silence(saved_base: Path, tmp_path: Path) -> None:
    model = get_peft_model(load(saved_base), LoraConfig(**LORA))
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        model.save_pretrained(tmp_path / "adapter")
        again = PeftModel.from_pretrained(load(saved_base), tmp_path / "adapter")
    assert norms(again) == norms(model)
    for found in (again, peft.AutoPeftModel.from_pretrained(tmp_path / "adapter")):  # the base by its name
        assert difference(run(found, inputs("bert")), run(model, inputs("bert"))) <= ROUNDING


def test_merged_model_saves_and_loads_as_a_patched_model(saved_base: Path, tmp_path: Path) -> None:
    model = get_peft_model(load(saved_base), LoraConfig(**LORA))
    expected = run(model, inputs("bert"))
    merged = model.merge_and_unload()
    merged.save_pretrained(tmp_path / "merged")
    again, info = AutoModelForMaskedLM.from_pretrained(tmp_path / "merged", output_loading_info=True)
    assert not any(info.values()), info
    assert norms(again) == norms(base())
    assert difference(run(again, inputs("bert")), expected) < 1e-5


def test_modules_to_save_with_norms_inside(saved_base: Path, tmp_path: Path) -> None:
    """The head, its swapped norm included, becomes the adapter's own copy."""
    config = LoraConfig(**LORA, modules_to_save=["transform"])
    model = get_peft_model(load(saved_base), config)
    with torch.no_grad():
        model.base_model.model.cls.predictions.transform.modules_to_save["default"].dense.weight.mul_(1.5)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        model.save_pretrained(tmp_path / "adapter")
        again = PeftModel.from_pretrained(load(saved_base), tmp_path / "adapter")
    assert len(norms(again)) == 7
    assert difference(run(again, inputs("bert")), run(model, inputs("bert"))) <= ROUNDING
    again.merge_and_unload().save_pretrained(tmp_path / "merged")
    assert norms(load(tmp_path / "merged")) == norms(base())


def test_norms_themselves_in_modules_to_save(tmp_path: Path) -> None:
    """LayerNorms under training are wrapped; patched behind PEFT's back they save under their own names."""
    model = get_peft_model(build("bert"), LoraConfig(**LORA, modules_to_save=["LayerNorm"]))
    patch_model(model, **SWAPS["adanorm"])
    assert len(norms(model)) == 12
    assert resolved_spec(model.base_model.model) == resolved_spec(base())
    model.merge_and_unload().save_pretrained(tmp_path)
    assert norms(load(tmp_path)) == norms(base())


def test_two_adapters_on_one_patched_base(saved_base: Path, tmp_path: Path) -> None:
    model = get_peft_model(load(saved_base), LoraConfig(**LORA))
    model.add_adapter("other", LoraConfig(**LORA))
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(load(saved_base), tmp_path)
    again.load_adapter(tmp_path / "other", adapter_name="other")
    for name in ("default", "other"):
        model.set_adapter(name)
        again.set_adapter(name)
        assert difference(run(again, inputs("bert")), run(model, inputs("bert"))) <= ROUNDING


@pytest.mark.skipif(
    Version(transformers.__version__) < Version("5.7"),
    reason="load_adapter of transformers < 5.7 reads no weights",
)
@pytest.mark.skipif(
    Version(peft.__version__) < Version(MIN_PEFT_VERSION),
    reason=f"transformers {transformers.__version__} takes adapters from PEFT {MIN_PEFT_VERSION} on",
)
def test_adapters_through_transformers_own_methods(saved_base: Path, tmp_path: Path) -> None:
    model = load(saved_base)
    model.add_adapter(LoraConfig(**LORA))
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        model.save_pretrained(tmp_path / "adapter")
    assert (tmp_path / "adapter" / "adapter_config.json").exists()
    again = load(saved_base)
    again.load_adapter(str(tmp_path / "adapter"))
    assert difference(run(again, inputs("bert")), run(model, inputs("bert"))) <= ROUNDING
    direct = load(tmp_path / "adapter")  # the base by its name in the adapter's config
    assert difference(run(direct, inputs("bert")), run(model, inputs("bert"))) <= ROUNDING


def test_ln_tuning_says_that_swapped_norms_have_nothing_to_tune() -> None:
    model = base()
    before = [type(module) for module in model.modules()]
    with pytest.raises(ValueError, match=r"LN tuning has nothing to tune in this BertForMaskedLM: all 6 norms"):
        get_peft_model(model, LNTuningConfig(target_modules=["LayerNorm"]))
    with pytest.raises(ValueError, match="nothing to tune"):
        get_peft_model(model, LNTuningConfig(target_modules=".*LayerNorm"))
    assert [type(module) for module in model.modules()] == before
    some = patch_model(build("bert"), layers=[0])
    with pytest.warns(UserWarning, match=r"2 of the norms that this adapter is to train were swapped"):
        get_peft_model(some, LNTuningConfig(target_modules=["LayerNorm"]))
    with pytest.warns(UserWarning, match=r"6 of the norms that this adapter is to train were swapped"):
        get_peft_model(base(), LoraConfig(**LORA, modules_to_save=["LayerNorm"]))


# ------------------------------------------------------------------------------------------- patching under an adapter


def test_patch_after_lora_uses_the_names_of_the_object_passed() -> None:
    model = get_peft_model(build("bert"), LoraConfig(**LORA))
    patch_model(model, **SWAPS["adanorm"], include="base_model.model.bert.embeddings.LayerNorm")
    assert set(norms(model)) == {"base_model.model.bert.embeddings.LayerNorm"}


def test_patch_after_lora_writes_the_bases_spec(tmp_path: Path) -> None:
    model = get_peft_model(build("bert"), LoraConfig(**LORA))
    assert patch_model(model, **SWAPS["adanorm"]) is model
    inner = model.get_base_model()
    assert inner.config.adanorm == base().config.adanorm
    assert model.config is inner.config
    merged = model.merge_and_unload()
    expected = run(merged, inputs("bert"))
    merged.save_pretrained(tmp_path)
    assert difference(run(load(tmp_path), inputs("bert")), expected) <= ROUNDING


def test_unpatch_under_an_adapter_is_bit_for_bit() -> None:
    model = get_peft_model(build("bert"), LoraConfig(**LORA))
    expected = run(model, inputs("bert"))
    unpatch_model(patch_model(model))
    assert not is_patched(model)
    assert difference(run(model, inputs("bert")), expected) == 0


# ---------------------------------------------------------------------------------------------------- closing the hole


def test_adapter_of_a_base_patched_in_memory_warns_and_carries_the_spec(stray: Path) -> None:
    config = json.loads((stray / "adapter_config.json").read_text())
    assert config["auto_mapping"]["adanorm"] == base().config.adanorm
    assert config["auto_mapping"]["base_model_class"] == "BertForMaskedLM"


def test_warning_names_the_base_that_the_adapter_will_be_put_on(tmp_path: Path) -> None:
    build("bert").save_pretrained(tmp_path / "stock")
    model = get_peft_model(patch_model(load(tmp_path / "stock")), LoraConfig(**LORA, task_type="FEATURE_EXTRACTION"))
    with pytest.warns(UserWarning, match=r"the base that it names, '.*stock', does not have these norms") as caught:
        model.save_pretrained(tmp_path / "adapter")
    assert len([w for w in caught if HOLE in str(w.message)]) == 1


def test_attaching_it_to_a_stock_base_raises_before_anything_is_attached(stray: Path) -> None:
    model = build("bert")
    before = [type(m) for m in model.modules()]
    with pytest.raises(
        ValueError, match=r"adanorm, C=1\.3, k=0\.07.*BertForMaskedLM has its stock norms.*patch_model"
    ):
        PeftModel.from_pretrained(model, stray)
    assert [type(m) for m in model.modules()] == before


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (SWAPS["layernorm-simple"], "trained on a base with other norms"),
        (SWAPS["none"], "trained on a base with other norms"),
        ({**SWAPS["adanorm"], "layers": [0]}, "trained on a base with other norms"),
        (
            {**SWAPS["adanorm"], "C": 1.2},
            r"needs adanorm, C=1\.3 at bert\.embeddings\.LayerNorm, .* and 4 more; .* has adanorm, C=1\.2\.",
        ),
        ({**SWAPS["adanorm"], "eps": 1e-5}, r"needs adanorm, eps=0\.001 at .* has adanorm, eps=1e-05\."),
        ({**SWAPS["adanorm"], "centered": False}, r"needs adanorm, centered=True at .* has adanorm, centered=False\."),
    ],
)
def test_attaching_it_to_a_base_with_other_norms_raises(options: dict[str, Any], told: str, stray: Path) -> None:
    with pytest.raises(ValueError, match=told):
        PeftModel.from_pretrained(patch_model(build("bert"), **options), stray)


def test_biases_and_eps_of_a_fold_are_named(tmp_path: Path) -> None:
    def folded() -> PreTrainedModel:
        model = patch_model(build("bert"), **SWAPS["adanorm"], layers=[0])
        model.bert.encoder.layer[1].output.LayerNorm.__dict__[ADJUSTED_EPS] = True
        model.bert.encoder.layer[1].output.dense.__dict__[ADDED_BIAS] = True
        return model

    with pytest.warns(UserWarning, match=HOLE):
        get_peft_model(folded(), LoraConfig(**LORA)).save_pretrained(tmp_path)
    told = (
        r"needs the bias of a fold at bert\.encoder\.layer\.1\.output\.dense; .* has its stock bias\. It needs the eps"
    )
    with pytest.raises(ValueError, match=told):
        PeftModel.from_pretrained(patch_model(build("bert"), **SWAPS["adanorm"], layers=[0]), tmp_path)


@pytest.mark.parametrize("trainable", [False, True])
def test_an_adapter_of_the_stock_base_on_a_patched_one_is_said(trainable: bool, tmp_path: Path) -> None:
    build("bert").save_pretrained(tmp_path / "stock")
    get_peft_model(load(tmp_path / "stock"), LoraConfig(**LORA)).save_pretrained(tmp_path / "adapter")
    model = patch_model(load(tmp_path / "stock"), **SWAPS["adanorm"])
    with pytest.warns(UserWarning, match=r"'.*stock' has other norms: It needs its stock norms at bert.*k=0\.07"):
        PeftModel.from_pretrained(model, tmp_path / "adapter", is_trainable=trainable)
    with pytest.warns(UserWarning, match="has other norms"):
        patch_model(load(tmp_path / "stock"), **SWAPS["adanorm"]).load_adapter(str(tmp_path / "adapter"))


def test_an_adapter_without_a_record_is_told_from_one_of_this_base(saved_base: Path, tmp_path: Path) -> None:
    """An adapter trained without hf_adanorm, on a base loaded by trust, has no record either."""
    get_peft_model(load(saved_base), LoraConfig(**LORA)).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    for name, warns in ((config["base_model_name_or_path"], False), ("nobody/nowhere", True), (None, True)):
        changed = {**config, "auto_mapping": None, "base_model_name_or_path": name}
        (tmp_path / "adapter_config.json").write_text(json.dumps(changed))
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            PeftModel.from_pretrained(load(saved_base), tmp_path)
            PeftModel.from_pretrained(build("bert"), tmp_path)
        told = [str(w.message) for w in caught if "may not belong" in str(w.message)]
        assert len(told) == warns
        assert all("cannot be read here" in line for line in told)


def test_attaching_it_to_a_base_with_these_norms_works(stray: Path) -> None:
    assert is_patched(PeftModel.from_pretrained(base(), stray))


def test_attaching_it_by_the_other_ways_raises_too(stray: Path) -> None:
    with pytest.raises(ValueError, match="other norms"):
        build("bert").load_adapter(str(stray))
    model = get_peft_model(build("bert"), LoraConfig(**LORA))
    with pytest.raises(ValueError, match="other norms"):
        model.load_adapter(stray, adapter_name="stray")
    assert list(model.peft_config) == ["default"]


def test_another_head_on_the_same_base_counts_as_the_same(tmp_path: Path, saved_base: Path) -> None:
    model = AutoModelForSequenceClassification.from_pretrained(saved_base)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        get_peft_model(model, LoraConfig(**LORA, task_type="SEQ_CLS")).save_pretrained(tmp_path / "adapter")
    again = AutoModelForSequenceClassification.from_pretrained(saved_base)
    assert is_patched(PeftModel.from_pretrained(again, tmp_path / "adapter"))


def test_prompt_tuning_is_guarded_as_well(tmp_path: Path) -> None:
    model = patch_model(build("gpt2"))
    config = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    with pytest.warns(UserWarning, match=HOLE):
        get_peft_model(model, config).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="other norms"):
        PeftModel.from_pretrained(build("gpt2"), tmp_path)


def test_patch_after_the_adapter_is_seen_at_save(tmp_path: Path) -> None:
    model = get_peft_model(build("bert"), LoraConfig(**LORA))
    patch_model(model, **SWAPS["adanorm"])
    with pytest.warns(UserWarning, match=HOLE):
        model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="other norms"):
        PeftModel.from_pretrained(build("bert"), tmp_path)
    unpatch_model(model)
    model.save_pretrained(tmp_path)
    assert not is_patched(PeftModel.from_pretrained(build("bert"), tmp_path))


def test_one_config_object_serves_patched_and_stock_models_alike() -> None:
    config = LoraConfig(**LORA)
    assert is_patched(get_peft_model(base(), config))
    assert not is_patched(get_peft_model(build("bert"), config))


def test_stock_adapters_are_saved_as_ever(tmp_path: Path) -> None:
    model = get_peft_model(build("bert"), LoraConfig(**LORA))
    model.save_pretrained(tmp_path / "with")
    install.uninstall()
    try:
        model.save_pretrained(tmp_path / "without")
    finally:
        install.install()
    names = ("adapter_config.json", "adapter_model.safetensors")
    assert all((tmp_path / "with" / n).read_bytes() == (tmp_path / "without" / n).read_bytes() for n in names)


def test_copies_and_pickles_of_an_adapted_model_keep_the_guard(tmp_path: Path) -> None:
    model = get_peft_model(base(), LoraConfig(**LORA))
    for i, twin in enumerate((copy.deepcopy(model), pickle.loads(pickle.dumps(model)))):
        with pytest.warns(UserWarning, match=HOLE):
            twin.save_pretrained(tmp_path / str(i))
        config = json.loads((tmp_path / str(i) / "adapter_config.json").read_text())
        assert config["auto_mapping"]["adanorm"] == base().config.adanorm


def test_adapter_on_a_plain_module(tmp_path: Path) -> None:
    def make() -> nn.Module:
        return nn.Sequential(nn.Linear(4, 6), nn.LayerNorm(6), nn.Linear(6, 2))

    config = LoraConfig(r=2, target_modules=["0"])
    with pytest.warns(UserWarning, match=r"saved without its base.*names no base"):
        get_peft_model(patch_model(make()), config).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="Sequential has its stock norms"):
        PeftModel.from_pretrained(make(), tmp_path)


def test_absent_peft_stays_absent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_FINDER, "waiting", {"peft": print})
    monkeypatch.setattr(sys, "meta_path", [_FINDER])
    assert _FINDER.find_spec("peft") is None
    assert _FINDER.find_spec("json") is None


# ------------------------------------------------------------------------------------------------------------- folds


def adapter_of(model: Any, folder: Path) -> Path:
    get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)).save_pretrained(folder)
    return folder


def test_an_adapter_trained_before_a_fold_is_reported_when_it_is_attached_afterwards(tmp_path: Path) -> None:
    model = fold_models.build("llama")
    adapter = adapter_of(copy.deepcopy(model), tmp_path / "adapter")
    fold_affine(model)
    with pytest.warns(UserWarning, match=r"may not belong to this base, whose norms were folded \(layers.0.input"):
        PeftModel.from_pretrained(model, adapter)


def test_an_adapter_trained_on_a_folded_base_goes_with_that_base_alone(tmp_path: Path) -> None:
    model = fold_models.build("llama")
    fold_affine(model)
    model.save_pretrained(tmp_path / "base")
    folded = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "base")
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="this adapter")
        adapter = adapter_of(folded, tmp_path / "adapter")
        PeftModel.from_pretrained(transformers.LlamaForCausalLM.from_pretrained(tmp_path / "base"), adapter)
    with pytest.raises(ValueError, match="the norms folded here are none"):
        PeftModel.from_pretrained(fold_models.build("llama"), adapter)
    with pytest.warns(UserWarning, match="which was folded in memory"):
        adapter_of(model, tmp_path / "stray")


@pytest.mark.parametrize("targets", [["model.norm"], ["lm_head"]])
def test_a_fold_keeps_norms_and_layers_that_an_adapter_trains(targets: list[str]) -> None:
    """`modules_to_save` keeps the original beside the adapter's copy, and the adapter can be disabled."""
    model = fold_models.build("llama")
    ids = {"input_ids": torch.arange(4, 16).view(1, 12)}
    wrapped = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=targets)).eval()
    for name, parameter in wrapped.named_parameters():
        if "modules_to_save" in name:
            parameter.data += 0.3
    with torch.no_grad():
        before = wrapped(**ids).logits
        with wrapped.disable_adapter():
            without = wrapped(**ids).logits
        report = fold_affine(wrapped, inputs=ids)
        assert report.names("folded")
        assert "model.norm" not in {name.removeprefix("base_model.model.") for name in report.names("folded")}
        torch.testing.assert_close(wrapped(**ids).logits, before, rtol=1e-4, atol=1e-5)
        with wrapped.disable_adapter():
            torch.testing.assert_close(wrapped(**ids).logits, without, rtol=1e-4, atol=1e-5)
