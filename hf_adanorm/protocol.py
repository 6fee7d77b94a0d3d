"""Methods of swapped norms that only this package needs, added to the classes of `modeling_adanorm.py` on import.

Everything else talks to a swapped norm through these methods, `norm_name`, `inner` (the module that computes) and
`plain_settings`. The file that travels with saved models stays short without them.
"""

from __future__ import annotations

import math
import sys
import zlib
from collections.abc import Iterable
from typing import Any, cast

import torch
from torch import Tensor

from . import modeling_adanorm
from .modeling_adanorm import LAYOUT, NOTICE
from .norms import settings_of


class _Norm(modeling_adanorm.SwappedNorm):
    given: Any

    def settings(self) -> dict[str, Any]:
        """Return the settings of this norm, by name."""
        if self.inner is self:
            return {name: getattr(self, name) for name in settings_of(type(self))}
        return {**settings_of(type(self.inner)), **self.given}

    def fresh(self, **changes: Any) -> Any:
        """Return a new norm with the same arguments, except for `changes`, on the CPU; the constructor checks them."""
        layout = {key: getattr(self, key) for key in LAYOUT} | {"device": "cpu"}
        if self.inner is self:
            return type(self)(**layout, **{**self.settings(), **changes})
        with torch.random.fork_rng(devices=[]):  # each draws the same numbers, and the caller's stay
            return cast(Any, type(self))(type(self.inner), self.norm_name, **layout, **{**self.given, **changes})

    def adopt(self, checked: Any, names: Iterable[str]) -> None:
        """Take over the attributes that depend on these settings; those that only start a parameter have none."""
        each = zip(self.inner.modules(), self.fresh().inner.modules(), checked.inner.modules(), strict=True)
        for own, old, new in each:
            for key, value in vars(new).items():
                if isinstance(value, (bool, int, float, str)) and vars(old).get(key) != value:
                    setattr(own, key, value)
        if self.inner is not self:
            self.given = {**self.given, **{name: checked.settings()[name] for name in names}}

    def get_extra_state(self) -> Tensor:
        """Return the numbers among the settings. The state dict holds them, so every checkpoint restores them."""
        numbers = self._numbers()
        return torch.tensor([*self._mark(numbers), *map(float, numbers.values())], dtype=torch.float64, device="cpu")

    def _numbers(self) -> dict[str, Any]:
        return {name: value for name, value in self.settings().items() if isinstance(value, (int, float))}

    def _mark(self, names: Iterable[str]) -> list[float]:
        # Two bytes that tell the class and the names of its settings, so that norms do not read each other's numbers.
        digest = zlib.crc32(f"{type(self.inner).__name__}({', '.join(names)})".encode())
        return [float(digest % 256), float(digest // 256 % 256)]

    def set_extra_state(self, state: Tensor) -> None:
        """Restore what `get_extra_state` returned; the constructor checks it. That of another norm has no effect."""
        now = self._numbers()
        if not isinstance(state, Tensor) or state.shape != (2 + len(now),) or state.is_meta:
            return  # loaders may pass a placeholder
        mark, values = state.tolist()[:2], state.tolist()[2:]
        if mark != self._mark(now):
            return
        new: dict[str, Any] = dict(zip(now, values, strict=True))
        whole = [name for name, old in now.items() if isinstance(old, int) and new[name].is_integer()]
        new |= {name: type(now[name])(new[name]) for name in whole}
        if new != now:
            self.adopt(self.fresh(**new), new)

    # transformers 5.0 reads and sets the settings of a checkpoint as if they were a parameter.
    _extra_state = property(get_extra_state, set_extra_state)

    def register_parameter(self, name: str, param: Any) -> None:
        if name == "_extra_state":
            self.set_extra_state(param)
        else:
            torch.nn.Module.register_parameter(self, name, param)

    def backward_factor(self, y: Tensor) -> Tensor | float | None:
        """Return the factor from dl/d(output) to dl/dy, with y = N(x) of (rows, H); None for 1, NaN if unknown."""
        if self.inner is not self:
            own = getattr(self.inner, "backward_factor", None)
            return math.nan if own is None else own(y)
        if self.norm_name == "adanorm":
            settings = self.settings()
            return y.mul_(-settings["C"] * settings["k"]).add_(settings["C"])  # phi(y)
        return math.nan if self.norm_name == "dyt" else None

    def extra_repr(self) -> str:
        shape = self.normalized_shape
        usual = {"centered": True, "channels_first": False, "output_dtype": None, "normalized_shape": shape}
        shown = {key: value for key in LAYOUT if (value := getattr(self, key)) != usual.get(key)}
        return ", ".join([str(shape), *(f"{key}={value}" for key, value in {**shown, **self.settings()}.items())])

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any) -> None:
        state_dict.pop(prefix + NOTICE, None)
        torch.nn.Module._load_from_state_dict(self, state_dict, prefix, *args, **kwargs)


def _dyt_from_norm(cls: Any, /, norm: Any, **settings: Any) -> Any:
    """Return a DyT with the gain and the bias of `norm`, a LayerNorm or RMSNorm of torch."""
    new = cls(norm.normalized_shape, norm.eps, **settings).to(norm.weight)
    with torch.no_grad():
        new.dyt_gain.copy_(norm.weight)
        if getattr(norm, "bias", None) is not None:
            new.dyt_bias.copy_(norm.bias)
    return new


def complete_all() -> None:
    """Add the methods to every copy of `modeling_adanorm.py` that is loaded, that of a saved model as well."""
    methods = {key: value for key, value in vars(_Norm).items() if callable(value) or isinstance(value, property)}
    for name, module in list(sys.modules.items()):
        if name.rpartition(".")[2] == "modeling_adanorm" and hasattr(module, "SwappedNorm"):
            for key, method in methods.items():
                setattr(module.SwappedNorm, key, method)
            module.DyT.from_norm = classmethod(_dyt_from_norm)
