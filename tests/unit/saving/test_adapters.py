"""PEFT on patched models, and adapters that record the norms of their base."""

from __future__ import annotations

import copy
import json
import pickle
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
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
ADANORM = SWAPS["adanorm"]
HOLE = "saved without its base"
OTHER_NORMS = "trained on a base with other norms"


def base(swap: str = "adanorm", **options: Any) -> PreTrainedModel:
    return patch_model(build("bert"), **{**SWAPS[swap], **options})


def load(folder: Path) -> Any:
    return AutoModelForMaskedLM.from_pretrained(folder)


def same_outputs(one: Any, other: Any) -> bool:
    return difference(run(one, inputs("bert")), run(other, inputs("bert"))) <= ROUNDING


@contextmanager
def silence() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        yield


@pytest.fixture
def saved_base(tmp_path: Path) -> Path:
    base().save_pretrained(tmp_path / "base")
    return tmp_path / "base"


@pytest.fixture
def stray(tmp_path: Path) -> Path:
    """Return an adapter whose base was patched in memory."""
    build("bert").save_pretrained(tmp_path / "stock")
    model = get_peft_model(patch_model(load(tmp_path / "stock"), **ADANORM), LoraConfig(**LORA))
    with pytest.warns(UserWarning, match=rf"{HOLE}, and the base that it names, '.*stock', does not have") as caught:
        model.save_pretrained(tmp_path / "stray")
    assert len([w for w in caught if HOLE in str(w.message)]) == 1
    return tmp_path / "stray"


# ---------------------------------------------------------------------------------------------- LoRA as it should work


@pytest.mark.parametrize("to_save", [None, ["transform"]], ids=["", "modules_to_save with a norm inside"])
def test_adapter_of_a_saved_base_goes_and_comes_back_in_silence(
    to_save: list[str] | None, saved_base: Path, tmp_path: Path
) -> None:
    model = get_peft_model(load(saved_base), LoraConfig(**LORA, modules_to_save=to_save))
    if to_save:  # the head, its swapped norm included, becomes the adapter's own copy
        with torch.no_grad():
            model.base_model.model.cls.predictions.transform.modules_to_save["default"].dense.weight.mul_(1.5)
    with silence():
        model.save_pretrained(tmp_path / "adapter")
        again = PeftModel.from_pretrained(load(saved_base), tmp_path / "adapter")
        assert norms(again) == norms(model)
        again.load_adapter(tmp_path / "adapter", adapter_name="other")
    for name in ("default", "other"):
        again.set_adapter(name)
        assert same_outputs(again, model)
    assert same_outputs(peft.AutoPeftModel.from_pretrained(tmp_path / "adapter"), model)
    expected = run(model, inputs("bert"))
    model.merge_and_unload().save_pretrained(tmp_path / "merged")
    merged, info = AutoModelForMaskedLM.from_pretrained(tmp_path / "merged", output_loading_info=True)
    assert not any(info.values()), info
    assert norms(merged) == norms(base())
    assert difference(run(merged, inputs("bert")), expected) < 1e-5


@pytest.mark.skipif(
    Version(transformers.__version__) < Version("5.7") or Version(peft.__version__) < Version(MIN_PEFT_VERSION),
    reason=f"load_adapter of transformers < 5.7 reads no weights, and this one needs PEFT {MIN_PEFT_VERSION}",
)
def test_adapters_through_transformers_own_methods(saved_base: Path, tmp_path: Path) -> None:
    model = load(saved_base)
    model.add_adapter(LoraConfig(**LORA))
    with silence():
        model.save_pretrained(tmp_path / "adapter")
    mapping = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())["auto_mapping"]
    assert mapping["base_model_class"] == "BertForMaskedLM"  # which AutoPeftModel reads
    again = load(saved_base)
    again.load_adapter(str(tmp_path / "adapter"))
    assert same_outputs(again, model)
    assert same_outputs(load(tmp_path / "adapter"), model)  # the base by its name in the adapter's config


def test_ln_tuning_says_that_swapped_norms_have_nothing_to_tune() -> None:
    with pytest.warns(UserWarning, match=r"6 swapped norms of this BertForMaskedLM have no gain and bias to tune"):
        get_peft_model(base(), LNTuningConfig(target_modules=["LayerNorm"]))
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*no gain and bias")
        get_peft_model(patch_model(build("bert"), "dyt"), LNTuningConfig(target_modules=["LayerNorm"]))


# ------------------------------------------------------------------------------------------- patching under an adapter


@pytest.mark.parametrize("to_save", [None, ["LayerNorm"]])
def test_patch_after_lora_writes_the_bases_spec(to_save: list[str] | None, tmp_path: Path) -> None:
    """Norms in modules_to_save are wrapped. Patched behind PEFT's back, they save under their own names."""
    model = get_peft_model(build("bert"), LoraConfig(**LORA, modules_to_save=to_save))
    assert patch_model(model, **ADANORM) is model
    inner = model.get_base_model()
    assert model.config is inner.config
    assert inner.config.adanorm == base().config.adanorm
    assert resolved_spec(inner) == resolved_spec(base())
    merged = model.merge_and_unload()
    merged.save_pretrained(tmp_path)
    assert same_outputs(load(tmp_path), merged)


def test_patch_after_lora_uses_the_names_of_the_object_passed_and_unpatch_is_bit_for_bit() -> None:
    model = get_peft_model(build("bert"), LoraConfig(**LORA))
    expected = run(model, inputs("bert"))
    patch_model(model, **ADANORM, include="base_model.model.bert.embeddings.LayerNorm")
    assert set(norms(model)) == {"base_model.model.bert.embeddings.LayerNorm"}
    assert not is_patched(unpatch_model(model))
    assert difference(run(model, inputs("bert")), expected) == 0


# ---------------------------------------------------------------------------------------------------- closing the hole


@pytest.mark.parametrize(
    ("options", "found"),
    [
        (None, r"embeddings\.LayerNorm \(and 5 more\) needs norm=adanorm, C=1\.3, k=0\.07.*has its stock module"),
        ({"swap": "layernorm-simple"}, r"needs norm=adanorm, C=1\.3.*has norm=layernorm-simple"),
        ({"layers": [0]}, r"and 3 more\) needs norm=adanorm, .* has its stock module"),
        ({"C": 1.2}, r"needs C=1\.3; this BertForMaskedLM has C=1\.2\."),
        ({"eps": 1e-5}, r"needs eps=0\.001; .* has eps=1e-05\."),
        ({"centered": False}, r"needs centered=True; .* has centered=False\."),
    ],
)
def test_attaching_it_to_a_base_with_other_norms_raises_before_anything_is_attached(
    options: dict[str, Any] | None, found: str, stray: Path
) -> None:
    model = build("bert") if options is None else base(**options)
    before = [type(module) for module in model.modules()]
    with pytest.raises(ValueError, match=f"{OTHER_NORMS}: .*{found}"):
        PeftModel.from_pretrained(model, stray)
    assert [type(module) for module in model.modules()] == before
    assert is_patched(PeftModel.from_pretrained(base(), stray))


@pytest.mark.parametrize(
    ("place", "mark", "what"), [("dense", ADDED_BIAS, "bias=True"), ("LayerNorm", ADJUSTED_EPS, "eps=1e-12")]
)
def test_biases_and_eps_of_a_fold_count(place: str, mark: str, what: str, tmp_path: Path) -> None:
    folded = base(layers=[0])
    folded.get_submodule(f"bert.encoder.layer.1.output.{place}").__dict__[mark] = True
    with pytest.warns(UserWarning, match=HOLE):
        get_peft_model(folded, LoraConfig(**LORA)).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=rf"output\.{place} needs {what}; .* has its stock module"):
        PeftModel.from_pretrained(base(layers=[0]), tmp_path)


def test_attaching_it_by_the_other_ways_raises_too(stray: Path) -> None:
    with pytest.raises(ValueError, match=OTHER_NORMS):
        build("bert").load_adapter(str(stray))
    model = get_peft_model(build("bert"), LoraConfig(**LORA))
    with pytest.raises(ValueError, match=OTHER_NORMS):
        model.load_adapter(stray, adapter_name="stray")
    assert list(model.peft_config) == ["default"]


def test_an_adapter_without_a_record_is_told_from_one_of_this_base(saved_base: Path, tmp_path: Path) -> None:
    """One trained on a stock base has no record, nor has one trained without hf_adanorm on a base loaded by trust."""
    build("bert").save_pretrained(tmp_path / "stock")
    get_peft_model(load(saved_base), LoraConfig(**LORA)).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    for name in (str(saved_base), str(tmp_path / "stock"), "nobody/nowhere", None):
        changed = {**config, "auto_mapping": None, "base_model_name_or_path": name}
        (tmp_path / "adapter_config.json").write_text(json.dumps(changed))
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            PeftModel.from_pretrained(load(saved_base), tmp_path, is_trainable=True)
            load(saved_base).load_adapter(str(tmp_path))
            PeftModel.from_pretrained(build("bert"), tmp_path)
        told = [w for w in caught if f"its base {name!r} has other norms" in str(w.message)]
        assert len(told) == (0 if name == str(saved_base) else 2)


@pytest.mark.parametrize("record", [{"adanorm": 5}, {"folded_norms": 5}, {"folded_norms": [["a"]]}])
def test_a_record_that_is_none_is_refused(record: dict[str, Any], stray: Path) -> None:
    config = json.loads((stray / "adapter_config.json").read_text())
    (stray / "adapter_config.json").write_text(json.dumps({**config, "auto_mapping": record}))
    with pytest.raises(ValueError, match="must be"):
        PeftModel.from_pretrained(build("bert"), stray)


def test_another_head_on_the_same_base_counts_as_the_same(saved_base: Path, tmp_path: Path) -> None:
    def make() -> Any:
        return AutoModelForSequenceClassification.from_pretrained(saved_base)

    with silence():
        get_peft_model(make(), LoraConfig(**LORA, task_type="SEQ_CLS")).save_pretrained(tmp_path / "adapter")
    assert is_patched(PeftModel.from_pretrained(make(), tmp_path / "adapter"))


def plain() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 6), nn.LayerNorm(6), nn.Linear(6, 2))


@pytest.mark.parametrize(
    ("make", "config"),
    [
        (lambda: build("gpt2"), PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)),
        (plain, LoraConfig(r=2, target_modules=["0"])),
    ],
)
def test_other_methods_and_modules_are_guarded_as_well(make: Callable[[], Any], config: Any, tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match=HOLE):
        get_peft_model(patch_model(make()), config).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=OTHER_NORMS):
        PeftModel.from_pretrained(make(), tmp_path)


def test_patch_after_the_adapter_is_seen_at_save(tmp_path: Path) -> None:
    config = LoraConfig(**LORA)
    model = get_peft_model(build("bert"), config)
    patch_model(model, **ADANORM)
    with pytest.warns(UserWarning, match=HOLE):
        model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=OTHER_NORMS):
        PeftModel.from_pretrained(build("bert"), tmp_path)
    unpatch_model(model)
    model.save_pretrained(tmp_path)
    assert not is_patched(PeftModel.from_pretrained(build("bert"), tmp_path))
    assert is_patched(get_peft_model(base(), config))  # one config object serves patched and stock models alike


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


def test_absent_peft_stays_absent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_FINDER, "waiting", {"peft": print})
    monkeypatch.setattr(sys, "meta_path", [_FINDER])
    assert _FINDER.find_spec("peft") is None
    assert _FINDER.find_spec("json") is None


@pytest.mark.parametrize("twin", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
@pytest.mark.filterwarnings(f"ignore:.*{HOLE}")
def test_copies_and_pickles_of_an_adapted_model_keep_the_record(twin: Callable[[Any], Any], tmp_path: Path) -> None:
    twin(get_peft_model(base(), LoraConfig(**LORA))).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["auto_mapping"]["adanorm"] == base().config.adanorm


# ------------------------------------------------------------------------------------------------------------- folds


def test_an_adapter_belongs_to_the_fold_that_it_was_trained_on(tmp_path: Path) -> None:
    def adapter_of(model: Any, name: str) -> Path:
        config = LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
        get_peft_model(model, config).save_pretrained(tmp_path / name)
        return tmp_path / name

    def make() -> Any:
        return transformers.LlamaForCausalLM.from_pretrained(tmp_path / "base")

    model = fold_models.build("llama")
    earlier = adapter_of(copy.deepcopy(model), "earlier")
    fold_affine(model)
    model.save_pretrained(tmp_path / "base")
    with pytest.warns(UserWarning, match="may not belong to this LlamaForCausalLM"):
        PeftModel.from_pretrained(make(), earlier)
    with silence():
        adapter = adapter_of(make(), "adapter")
        PeftModel.from_pretrained(make(), adapter)
    with pytest.raises(ValueError, match=r"layers\.0\.input_layernorm \(and 4 more\) needs folded=True"):
        PeftModel.from_pretrained(fold_models.build("llama"), adapter)
    with pytest.warns(UserWarning, match=HOLE):
        adapter_of(model, "stray")


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
