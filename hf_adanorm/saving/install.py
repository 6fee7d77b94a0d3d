"""List the methods of other libraries that this package wraps. Each is wrapped once its library is imported.

The functions behind the wrappers (hooks.py, adapters.py) are imported when a wrapper is first called. So
`import hf_adanorm` is quick and imports none of these libraries itself.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from inspect import BoundArguments
from typing import Any

from .wrapping import Around, unwrap_methods, when_imported, wrap_method


def install() -> None:
    """Wrap the methods, or wait for them; does nothing for what is wrapped already."""
    when_imported("transformers.configuration_utils", _wrap_configs)
    when_imported("transformers.modeling_utils", _wrap_models)
    when_imported("transformers.trainer", _wrap_trainer)
    when_imported("peft", _wrap_peft)
    when_imported("accelerate.utils.modeling", _wrap_accelerate)


def uninstall() -> None:
    """Remove the wrappers, and stop waiting for imports."""
    unwrap_methods()


def _wrap_configs(module: Any) -> None:
    wrap_method(module, "PreTrainedConfig.to_json_file", _late("hooks", "to_json_file"), "json_file_path")


def _wrap_models(module: Any) -> None:
    wrap_method(module, "PreTrainedModel.post_init", _late("hooks", "post_init"))
    wrap_method(module, "PreTrainedModel.save_pretrained", _late("hooks", "save_pretrained"), "save_directory")
    adjust = _late("hooks", "adjust_missing_and_unexpected_keys")
    wrap_method(module, "PreTrainedModel._adjust_missing_and_unexpected_keys", adjust)
    upload = _late("hooks", "upload_modified_files")
    wrap_method(module, "PreTrainedModel._upload_modified_files", upload, "working_dir", "repo_id")


def _wrap_trainer(module: Any) -> None:
    load, push = _late("hooks", "load_from_checkpoint"), _late("hooks", "push_from_checkpoint")
    wrap_method(module, "Trainer._load_from_checkpoint", load, "resume_from_checkpoint")
    wrap_method(module, "Trainer.create_model_card", _late("hooks", "create_model_card"))
    wrap_method(module, "Trainer.get_decay_parameter_names", _late("hooks", "get_decay_parameter_names"), "model")
    wrap_method(module, "Trainer._push_from_checkpoint", push, "checkpoint_folder")


def _wrap_peft(peft: Any) -> None:
    inject = _late("adapters", "inject_adapter")
    wrap_method(peft, "tuners.tuners_utils.BaseTuner.inject_adapter", inject, "model", "adapter_name")
    wrap_method(peft, "PeftModel.add_adapter", _late("adapters", "add_adapter"), "peft_config")
    wrap_method(peft, "config.PeftConfigMixin.save_pretrained", _late("adapters", "save_config"), "kwargs")
    wrap_method(peft, "config.PeftConfigMixin.from_pretrained", _late("adapters", "load_config"))


def _wrap_accelerate(module: Any) -> None:
    wrap_method(module, "load_state_dict", _late("hooks", "load_state_dict"))


def _late(module: str, name: str) -> Around:
    def around(original: Callable[..., Any], self: Any, bound: BoundArguments) -> Any:
        return getattr(importlib.import_module(f".{module}", __package__), name)(original, self, bound)

    return around
