"""List the methods of other libraries that this package wraps. Each is wrapped once its library is imported.

The functions behind the wrappers (hooks.py, adapters.py) are imported when a wrapper is first called. So
`import hf_adanorm` is quick and imports none of these libraries itself.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from inspect import BoundArguments
from typing import Any

from .wrapping import unwrap_methods, when_imported, wrap_method

# By module: the method, the function that wraps it, and the arguments that this function reads.
WRAPPED: dict[str, list[tuple[str, ...]]] = {
    "transformers.configuration_utils": [("PreTrainedConfig.to_json_file", "hooks.to_json_file", "json_file_path")],
    "transformers.modeling_utils": [
        ("PreTrainedModel.post_init", "hooks.post_init"),
        ("PreTrainedModel.save_pretrained", "hooks.save_pretrained", "save_directory"),
        ("PreTrainedModel._adjust_missing_and_unexpected_keys", "hooks.adjust_missing_and_unexpected_keys"),
        ("PreTrainedModel._upload_modified_files", "hooks.upload_modified_files", "working_dir", "repo_id"),
    ],
    "transformers.trainer": [
        ("Trainer._load_from_checkpoint", "hooks.load_from_checkpoint", "resume_from_checkpoint"),
        ("Trainer.create_model_card", "hooks.create_model_card"),
        ("Trainer.get_decay_parameter_names", "hooks.get_decay_parameter_names", "model"),
        ("Trainer._push_from_checkpoint", "hooks.push_from_checkpoint", "checkpoint_folder"),
    ],
    "peft": [
        ("tuners.tuners_utils.BaseTuner.inject_adapter", "adapters.inject_adapter", "model", "adapter_name"),
        ("PeftModel.add_adapter", "adapters.add_adapter", "peft_config"),
        ("config.PeftConfigMixin.save_pretrained", "adapters.save_config", "kwargs"),
        ("config.PeftConfigMixin.from_pretrained", "adapters.load_config"),
    ],
    "accelerate.utils.modeling": [("load_state_dict", "hooks.load_state_dict")],
}


def install() -> None:
    """Wrap the methods, or wait for their modules; does nothing for what is wrapped already."""
    for name, methods in WRAPPED.items():
        when_imported(name, functools.partial(_wrap, methods))


def uninstall() -> None:
    """Remove the wrappers, and stop waiting for imports."""
    unwrap_methods()


def _wrap(methods: list[tuple[str, ...]], module: Any) -> None:
    for path, function, *reads in methods:
        wrap_method(module, path, functools.partial(_call, function), *reads)


def _call(function: str, original: Callable[..., Any], self: Any, bound: BoundArguments) -> Any:
    module, _, name = function.partition(".")
    return getattr(importlib.import_module(f".{module}", __package__), name)(original, self, bound)
