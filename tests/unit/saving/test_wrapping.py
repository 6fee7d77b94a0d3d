"""Wrapped methods of other libraries: on stock models nobody can tell them from the originals."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

import accelerate.utils.modeling as accelerate_modeling
import pytest
from huggingface_hub import HfApi
from peft import LoraConfig, PeftConfig, PeftModel, PromptTuningConfig, get_peft_model
from peft.config import PeftConfigMixin
from peft.tuners.tuners_utils import BaseTuner
from transformers import BertConfig, BertModel, PreTrainedConfig, PreTrainedModel, Trainer, TrainingArguments
from transformers.utils.loading_report import LoadStateDictInfo

from hf_adanorm.saving import wrapping
from hf_adanorm.saving.wrapping import wrap_method

SIZES = {"vocab_size": 9, "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 8}


def tiny() -> BertModel:
    return BertModel(BertConfig(**SIZES))


def lora() -> LoraConfig:
    return LoraConfig(target_modules=["query"])


@pytest.fixture
def everything_wrapped() -> set[tuple[Any, str]]:
    return set(wrapping._ACTIVE)


def calls(folder: Path) -> dict[tuple[Any, str], tuple[Callable[..., Any], dict[str, Any]]]:
    """Each wrapped method on a stock model, with all that it must be given."""
    model, adapted = tiny(), get_peft_model(tiny(), lora())
    adapted.save_pretrained(folder / "adapter")
    model.save_pretrained(folder / "checkpoint")
    arguments = TrainingArguments(str(folder / "trainer"), report_to="none", use_cpu=True, hub_strategy="end")
    trainer = Trainer(model, arguments)
    return {
        (PreTrainedModel, "post_init"): (model.post_init, {}),
        (PreTrainedConfig, "to_json_file"): (model.config.to_json_file, {"json_file_path": folder / "a.json"}),
        (PreTrainedModel, "save_pretrained"): (model.save_pretrained, {"save_directory": folder / "saved"}),
        (PreTrainedModel, "_adjust_missing_and_unexpected_keys"): (
            model._adjust_missing_and_unexpected_keys,
            {
                "loading_info": LoadStateDictInfo(
                    **{item.name: set() for item in dataclasses.fields(LoadStateDictInfo)}
                )
            },
        ),
        (PreTrainedModel, "_upload_modified_files"): (
            model._upload_modified_files,
            {"working_dir": str(folder), "repo_id": "me/model", "files_timestamps": {}},
        ),
        (Trainer, "_load_from_checkpoint"): (
            trainer._load_from_checkpoint,
            {"resume_from_checkpoint": str(folder / "checkpoint")},
        ),
        (Trainer, "get_decay_parameter_names"): (trainer.get_decay_parameter_names, {"model": model}),
        (Trainer, "create_model_card"): (trainer.create_model_card, {"language": "en"}),
        (Trainer, "_push_from_checkpoint"): (trainer._push_from_checkpoint, {"checkpoint_folder": str(folder)}),
        (BaseTuner, "inject_adapter"): (
            adapted.base_model.inject_adapter,
            {"model": tiny(), "adapter_name": "default"},
        ),
        (PeftModel, "add_adapter"): (adapted.add_adapter, {"adapter_name": "other", "peft_config": lora()}),
        (PeftConfigMixin, "from_pretrained"): (
            PeftConfig.from_pretrained,
            {"pretrained_model_name_or_path": str(folder / "adapter")},
        ),
        (accelerate_modeling, "load_state_dict"): (
            accelerate_modeling.load_state_dict,
            {"checkpoint_file": str(folder / "checkpoint" / "model.safetensors")},
        ),
        (PeftConfigMixin, "save_pretrained"): (lora().save_pretrained, {"save_directory": str(folder / "config")}),
    }


def test_wrappers_have_the_signatures_of_what_they_wrap(everything_wrapped: set[tuple[Any, str]]) -> None:
    for owner, name in everything_wrapped:
        wrapper = getattr(getattr(owner, name), "__func__", getattr(owner, name))
        assert inspect.signature(wrapper) == inspect.signature(wrapper.__wrapped__)
        assert (wrapper.__name__, wrapper.__doc__) == (wrapper.__wrapped__.__name__, wrapper.__wrapped__.__doc__)


@pytest.mark.parametrize("by_name", [True, False])
def test_each_takes_its_arguments_by_position_and_by_name(
    by_name: bool, everything_wrapped: set[tuple[Any, str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(HfApi, "create_commit", lambda *_, **__: None)
    # transformers 5.0 holds the function from its import on
    monkeypatch.setattr("transformers.utils.hub.create_commit", lambda *_, **__: None, raising=False)
    listed = calls(tmp_path)
    assert listed.keys() == everything_wrapped
    for method, arguments in listed.values():
        method(**arguments) if by_name else method(*arguments.values())
    assert (tmp_path / "saved" / "model.safetensors").exists()


def test_every_kind_of_argument_arrives_as_it_was_given(monkeypatch: pytest.MonkeyPatch) -> None:
    class Owner:
        def method(self, a: int, /, b: int, *rest: int, original: int = 4, **more: int) -> tuple[Any, ...]:
            return a, b, rest, original, more

    seen = []

    def around(original: Callable[..., Any], self: Any, bound: inspect.BoundArguments) -> Any:
        seen.append(bound.arguments["b"])
        return original(self)

    monkeypatch.setattr(wrapping, "_ACTIVE", {})
    wrap_method(Owner, "method", around, "b")
    assert Owner().method(1, 2, 3, original=5, self=6, bound=7) == (1, 2, (3,), 5, {"self": 6, "bound": 7})
    assert Owner().method(1, b=2) == (1, 2, (), 4, {})
    with pytest.raises(TypeError, match=r"Owner\.method\(\) missing 1 required positional argument: 'b'"):
        Owner().method(1)  # type: ignore[call-arg]
    assert seen == [2, 2]


@pytest.mark.parametrize(
    ("name", "reads", "message"),
    [
        ("gone", (), r"Owner\.gone is not there"),
        ("Gone.method", (), r"Owner\.Gone\.method is not there"),
        ("method", ("path",), r"Owner\.method takes \(self, a\).*\(self, path"),
    ],
)
def test_a_method_that_changed_is_said_and_left_alone(
    name: str, reads: tuple[str, ...], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Owner:
        def method(self, a):  # type: ignore[no-untyped-def]
            return a

    before = dict(vars(Owner))
    monkeypatch.setattr(wrapping, "_ACTIVE", {})
    with pytest.warns(UserWarning, match=message):
        wrap_method(Owner, name, lambda original, self, bound: None, *reads)
    assert dict(vars(Owner)) == before


def test_prompt_learning_adapters_are_added_by_name() -> None:
    base = tiny()
    base.config.is_encoder_decoder = False
    model = get_peft_model(base, PromptTuningConfig(task_type="FEATURE_EXTRACTION", num_virtual_tokens=2))
    model.add_adapter("other", peft_config=PromptTuningConfig(task_type="FEATURE_EXTRACTION", num_virtual_tokens=2))
    assert set(model.peft_config) == {"default", "other"}
