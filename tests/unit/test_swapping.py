"""All or nothing: whatever is raised while norms change, and wherever, the model is as it was, or the call is done."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import hf_adanorm
from hf_adanorm import finish_fading, fold_affine, patch_model, set_fade, unpatch_model
from hf_adanorm.running import dummy_inputs
from hf_adanorm.swapping import Change
from tests.zoo.fold_models import build

transformers.logging.set_verbosity_error()
PACKAGE = str(Path(hf_adanorm.__file__).parent)


def picture(model: nn.Module) -> dict[str, Any]:
    """All that a call might leave behind: tensors, modules and their plain attributes, hooks, flags, the config."""
    seen: dict[str, Any] = {f"tensor {key}": value.clone() for key, value in model.state_dict().items()}
    for name, module in model.named_modules():
        seen[f"module {name}"] = type(module)
        for key, value in vars(module).items():
            if isinstance(value, (bool, int, float, str, type(None))):
                seen[f"attribute {name} {key}"] = value
            elif "hooks" in key:
                seen[f"hooks {name} {key}"] = list(value)
    return seen | {"config": model.config.to_dict(), "ddp": getattr(model, "_ddp_params_and_buffers_to_ignore", None)}


def same(one: dict[str, Any], other: dict[str, Any]) -> bool:
    return one.keys() == other.keys() and all(
        torch.equal(value, other[key]) if isinstance(value, Tensor) else value == other[key]
        for key, value in one.items()
    )


def interrupted(call: Callable[[], Any], error: BaseException, at: int) -> int:
    """Run `call` and raise `error` at the line number `at` that it goes through in the package (0: nowhere); the lines
    gone through."""
    count = 0

    def trace(frame: Any, event: str, _: Any) -> Any:
        nonlocal count
        if not frame.f_code.co_filename.startswith(PACKAGE):
            return None
        if event == "line":
            count += 1
            if count == at:
                raise error
        return trace

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        sys.settrace(trace)
        try:
            call()
        except type(error):
            pass
        finally:
            sys.settrace(None)
    return count


def patched(name: str, **options: Any) -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return patch_model(build(name), **options)


def faded() -> nn.Module:
    model = patched("bert-cls", affine="fade")
    set_fade(model, 1.0)
    return model


CALLS: dict[str, tuple[Callable[[], nn.Module], Callable[[nn.Module], Any]]] = {
    "drop": (lambda: build("bert-cls"), patch_model),
    "fade": (lambda: build("bert-cls"), lambda m: patch_model(m, affine="fade")),
    "fold": (lambda: build("gpt2-lm untied"), lambda m: patch_model(m, affine="fold")),
    "calibrate": (
        lambda: build("bert-cls"),
        lambda m: patch_model(m, affine="fold", on_unfoldable="calibrate", fold_inputs=dummy_inputs(m)),
    ),
    "fold_affine": (lambda: build("gpt2-lm untied"), fold_affine),
    "unpatch": (lambda: patched("bert-cls"), unpatch_model),
    "finish_fading": (faded, finish_fading),
}


@pytest.mark.parametrize("error", [KeyboardInterrupt(), MemoryError()], ids=["interrupt", "memory"])
@pytest.mark.parametrize("name", CALLS)
def test_wherever_a_call_is_stopped_it_is_undone_or_done(name: str, error: BaseException) -> None:
    make, call = CALLS[name]
    model = make().train()
    before = picture(model)
    lines = interrupted(lambda: call(model), error, 0)
    done, undone = picture(model), 0
    assert not same(before, done)
    for at in {lines * step // 8 for step in range(1, 8)} | {lines - 3, lines - 30}:
        model = make().train()
        interrupted(lambda: call(model), error, max(at, 1))  # noqa: B023
        now = picture(model)
        assert same(now, before) or same(now, done), at
        undone += same(now, before)
    assert undone >= 4


@pytest.mark.parametrize(
    ("make", "call"),
    [
        (lambda: build("bert-cls"), patch_model),
        (lambda: build("gpt2-lm"), lambda m: patch_model(m, affine="fold")),  # its last norm is kept
        (lambda: build("bert-cls"), lambda m: patch_model(m, affine="fold", on_unfoldable="approximate")),
        (lambda: patched("gpt2-lm untied", affine="fold"), unpatch_model),  # a bias stays
    ],
    ids=["drop", "fold", "approximate", "unpatch"],
)
def test_a_warning_that_is_an_error_takes_the_call_back(make: Callable[[], nn.Module], call: Any) -> None:
    model = make()
    before = picture(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(UserWarning):
            call(model)
    assert same(picture(model), before)
    with pytest.warns(UserWarning, match="norms|linear layers") as caught:
        call(model)
    assert [warning.filename for warning in caught] == [__file__]
    assert not same(picture(model), before)


def test_a_second_interrupt_waits_until_everything_is_back() -> None:
    class Twice(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            nonlocal times
            if getattr(func, "__name__", "") == "copy_" and times:
                times -= 1
                raise KeyboardInterrupt
            return func(*args, **(kwargs or {}))

    model = build("vit")
    before, times = picture(model), 0
    change = Change(model)
    for parameter in model.parameters():
        change.keep(parameter)
        parameter.data.zero_()
    times = 3
    with Twice(), pytest.raises(KeyboardInterrupt):
        change.undo()
    assert same(picture(model), before)


@given(
    dtype=st.sampled_from([torch.float64, torch.float32, torch.float16, torch.bfloat16]),
    seed=st.integers(0, 1000),
    columns=st.integers(1, 9),
)
def test_what_is_kept_in_last_places_comes_back_bit_for_bit(dtype: torch.dtype, seed: int, columns: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    layer = nn.Linear(columns, 5).to(dtype)
    gain = torch.randn(columns, generator=generator, dtype=torch.float64)
    if seed % 5 == 0:
        gain[0] = 0.0  # what a gain of 0 has taken cannot be computed back
    old = layer.weight.detach().clone()
    change = Change(layer)
    new = (old.double() * gain).to(dtype)
    change.keep(layer.weight, new, lambda x: (x.double() / gain).to(dtype))
    with torch.no_grad():
        layer.weight.copy_(new)
    change.undo()
    assert torch.equal(layer.weight, old)
