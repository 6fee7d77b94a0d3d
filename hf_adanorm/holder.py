"""Hold a norm of another author's class, a plain module, in the place of the norm that it replaces."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn

from .modeling_adanorm import LAYOUT, SwappedNorm, output_dtype


class Held(SwappedNorm):
    """Call the author's module `norm` as the model called the norm that it replaces; the rest is SwappedNorm's.

    `arguments` are those of SwappedNorm, and the settings of the author's class `cls`.
    """

    inner = property(lambda self: self.norm)

    def __init__(self, cls: type[nn.Module], norm_name: str, **arguments: Any) -> None:
        super().__init__(**{key: arguments.pop(key) for key in (*LAYOUT, "device", "dtype") if key in arguments})
        self.norm_name, self.given = norm_name, arguments
        shape: Any = self.normalized_shape[0] if len(self.normalized_shape) == 1 else self.normalized_shape
        try:
            with self.weight.device:
                self.norm = cls(shape, self.eps, **arguments).to(self.weight.dtype)
        except Exception as error:
            given = ", ".join(f"{key}={value!r}" for key, value in arguments.items())
            error.add_note(f"while building {cls.__name__}({given})")
            raise
        for module in self.norm.modules():
            cast(Any, module)._is_hf_initialized = True  # the model's `_init_weights` must not touch it

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Fill the tensors that no checkpoint has filled with those of a new norm."""
        super().reset_parameters()
        layout = {key: getattr(self, key) for key in LAYOUT}
        fresh = Held(type(self.norm), self.norm_name, **layout, **self.given, device="cpu").norm
        for old, new in zip(self.norm.modules(), fresh.modules(), strict=True):
            filled = old.state_dict(keep_vars=True)
            for key, value in (*new.named_parameters(recurse=False), *new.named_buffers(recurse=False)):
                if not getattr(filled.get(key), "_is_hf_initialized", False):
                    getattr(old, key).copy_(value)
            for key, value in vars(new).items():  # a plain tensor stays on the meta device
                if isinstance(value, Tensor) and not self.weight.is_meta:
                    setattr(old, key, value.to(self.weight.device))

    def run(self, x: Tensor) -> Tensor:
        return cast(Tensor, self.norm(x)).to(output_dtype(x))


def held(classes: Mapping[str, type[nn.Module]]) -> dict[str, Callable[..., Held]]:
    """Return for the classes by name what builds the holder of each, as the loader expects it."""
    return {name: functools.partial(Held, cls, name) for name, cls in classes.items()}
