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
from torch import Tensor, nn
from torch.nn.utils import parametrize

import hf_adanorm
from hf_adanorm import Fold, fold_affine, inspect_model, is_patched, patch_model, unpatch_model
from hf_adanorm.running import dummy_inputs
from hf_adanorm.swapping import Change
from tests.zoo.fold_models import build
from tests.zoo.pictures import picture, same
from tests.zoo.round_trip import SWAPS, inputs, norms, tiny

transformers.logging.set_verbosity_error()
PACKAGE = str(Path(hf_adanorm.__file__).parent)


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


CALLS: dict[str, tuple[Callable[[], nn.Module], Callable[[nn.Module], Any]]] = {
    "drop": (lambda: build("bert-cls"), patch_model),
    "fold": (lambda: build("gpt2-lm untied"), lambda m: patch_model(m, affine="fold")),
    "calibrate": (
        lambda: build("bert-cls"),
        lambda m: patch_model(m, affine=Fold(unfoldable="calibrate", inputs=dummy_inputs(m))),
    ),
    "fold_affine": (lambda: build("gpt2-lm untied"), fold_affine),
    "unpatch": (lambda: patched("bert-cls"), unpatch_model),
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
        (lambda: build("bert-cls"), lambda m: patch_model(m, affine=Fold(unfoldable="approximate"))),
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
        change.restore()
    assert same(picture(model), before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_dtype_and_training_flag_carry_over(dtype: torch.dtype) -> None:
    model = tiny().to(dtype).train()
    model.bert.embeddings.eval()
    patch_model(model)
    assert {t.dtype for t in (*model.parameters(), *model.buffers()) if t.is_floating_point()} == {dtype}
    assert not model.bert.embeddings.LayerNorm.training
    assert model.bert.encoder.layer[0].output.LayerNorm.training


def test_hooks_carry_over_there_and_back_and_their_handles_work() -> None:
    model = tiny()
    seen: list[str] = []
    name = "bert.encoder.layer.1.output.LayerNorm"
    norm = model.get_submodule(name)
    handles = [
        norm.register_forward_hook(lambda m, args, out: seen.append(type(m).__name__)),
        norm.register_forward_pre_hook(lambda m, args, kwargs: seen.append("pre"), with_kwargs=True),
        norm.register_full_backward_hook(lambda m, gin, gout: seen.append("backward")),
    ]
    patch_model(model)
    model(**inputs("bert")).logits.sum().backward()
    assert sorted(seen) == ["AdaNorm", "backward", "pre"]
    seen.clear()
    handles[0].remove()
    model(**inputs("bert"))
    assert seen == ["pre"]
    model.get_submodule(name).register_forward_hook(lambda m, args, out: seen.append("late"))
    unpatch_model(model)
    seen.clear()
    model(**inputs("bert"))
    assert seen == ["pre", "late"]


def test_meta_device() -> None:
    with torch.device("meta"):
        model = tiny()
    patch_model(model, C=1.3)
    assert len(norms(model)) == 6
    assert all(t.is_meta for t in (*model.parameters(), *model.buffers()) if t.numel() == 1)
    assert unpatch_model(model).bert.embeddings.LayerNorm.weight.is_meta


def test_device_follows_the_model_for_norms_without_tensors() -> None:
    model = nn.Sequential(nn.Linear(4, 4, dtype=torch.bfloat16), nn.LayerNorm(4, elementwise_affine=False))
    patch_model(model)
    assert model[1].weight.dtype == torch.bfloat16


def test_moving_a_patched_model_moves_its_norms() -> None:
    model = patch_model(tiny()).to(torch.bfloat16)
    assert model.bert.embeddings.LayerNorm.weight.dtype == torch.bfloat16
    restored = unpatch_model(model).bert.embeddings.LayerNorm
    assert restored.weight.dtype == torch.bfloat16


def test_parameters_go_and_nothing_else() -> None:
    model = tiny()
    before = {name: id(p) for name, p in model.named_parameters()}
    patch_model(model)
    after = {name: id(p) for name, p in model.named_parameters()}
    assert after == {name: key for name, key in before.items() if "LayerNorm" not in name}
    buffers = {name: tuple(b.shape) for name, b in model.named_buffers() if "LayerNorm" in name}
    assert len(buffers) == 6
    assert set(buffers.values()) == {(1,)}
    settings = {name.replace(".weight", "._extra_state") for name in buffers}
    assert {name for name in model.state_dict() if "LayerNorm" in name} == {*buffers, *settings}


@pytest.mark.parametrize("norm", SWAPS)
def test_readers_of_a_norms_attributes_keep_working(norm: str) -> None:
    model = patch_model(tiny(), norm)
    found = model.bert.embeddings.LayerNorm
    assert found.weight.dtype == torch.float32
    assert found.weight.device == torch.device("cpu")
    assert found.bias is None
    assert found.normalized_shape == (32,)
    assert found.eps == found.variance_epsilon == 1e-12
    assert found.elementwise_affine is False


class DeepSpeedEngine(nn.Sequential):
    """Has the class name that DeepSpeed's engine has, and like it contains the model."""


def compiled_layer(model: Any) -> nn.Module:
    model.bert.encoder.layer[0].compile()
    return model


@pytest.mark.parametrize(
    ("wrap", "named"),
    [
        (nn.DataParallel, "DataParallel"),
        (DeepSpeedEngine, "DeepSpeedEngine"),
        (torch.compile, "OptimizedModule"),
        (compiled_layer, "torch.compile"),
    ],
)
@pytest.mark.parametrize("call", [patch_model, unpatch_model])
def test_wrapped_models_are_refused(call: Callable[..., Any], wrap: Callable[..., nn.Module], named: str) -> None:
    model = tiny() if call is patch_model else patch_model(tiny())
    wrapped = wrap(model)
    before = picture(model)
    with pytest.raises(ValueError, match=rf"{named}.*before"):
        call(wrapped)
    assert same(picture(model), before)


@pytest.fixture
def one_process_group(tmp_path: Any) -> Any:
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.usefixtures("one_process_group")
def test_ddp_and_fsdp2_models_are_refused() -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    model = tiny()
    with pytest.raises(ValueError, match=r"DistributedDataParallel.*before"):
        patch_model(nn.parallel.DistributedDataParallel(model))
    assert not is_patched(model)
    mesh = init_device_mesh("cpu", (1,))
    for layer in model.bert.encoder.layer:
        fully_shard(layer, mesh=mesh)
    with pytest.raises(ValueError, match=r"FSDP.*before"):
        patch_model(model)
    assert not is_patched(model)


@pytest.mark.parametrize(
    ("options", "error", "says"),
    [
        ({"C": 0.0}, ValueError, "C must be"),
        ({"eps": -1e-5}, ValueError, "eps must be"),
        ({"norm": "rmsnorm"}, ValueError, "norm must be one of"),
        ({"norm": "detachnorm", "detach_mean": False, "detach_variance": False}, ValueError, "nothing is detached"),
        ({"centered": "no"}, ValueError, "centered"),
        ({"include": "nothing"}, ValueError, "include"),
        ({"exclude": ["nothing"]}, ValueError, "exclude"),
        ({"layers": [7]}, ValueError, "layers"),
        ({"targets": "rmsnorm"}, ValueError, "no norm to swap"),
    ],
)
@pytest.mark.parametrize("already", [False, True])
def test_failing_call_leaves_the_model_as_it_was(
    options: dict[str, Any], error: type[Exception], says: str, already: bool
) -> None:
    model = patch_model(tiny(), "adanorm", layers=[0]) if already else tiny()
    before = picture(model)
    with pytest.raises(error, match=says):
        patch_model(model, **options)
    assert same(picture(model), before)


class Half(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return weight * 0.5


def test_parametrized_norm_is_refused_before_anything_moved() -> None:
    model = tiny()
    parametrize.register_parametrization(model.bert.encoder.layer[1].output.LayerNorm, "weight", Half())
    before = picture(model)
    with pytest.raises(
        ValueError, match=r"layer\.1\.output\.LayerNorm is under torch\.nn\.utils\.parametrize.*exclude"
    ):
        patch_model(model)
    assert same(picture(model), before)
    patch_model(model, exclude=["layer.1.output.LayerNorm"])
    assert len(norms(model)) == 5


def test_unpatch_gives_back_the_very_modules_and_tensors() -> None:
    def ids() -> dict[str, int]:
        return {n: id(x) for n, x in (*model.named_modules(), *model.named_parameters(), *model.named_buffers())}

    model = tiny()
    before, seen = ids(), picture(model)
    unpatch_model(patch_model(model))
    assert ids() == before
    assert same(picture(model), seen)


def test_inspecting_changes_nothing() -> None:
    model = tiny()
    before = picture(model)
    inspect_model(model)
    assert same(picture(model), before)
