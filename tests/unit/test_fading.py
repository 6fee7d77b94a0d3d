"""Fading gain, bias, k and C: the source at t = 0, a plain swapped norm at t = 1, exact checkpoints in between."""

from __future__ import annotations

import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
import transformers
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainingArguments

from hf_adanorm import (
    FadeCallback,
    finish_fading,
    inspect_model,
    modeling_adanorm,
    patch_model,
    set_fade,
    unpatch_model,
)
from hf_adanorm.fading import fade_at
from hf_adanorm.running import dummy_inputs
from tests.zoo.fold_models import build
from tests.zoo.processes import together

transformers.logging.set_verbosity_error()
C, K = 1.3, 0.07


def output(model: nn.Module, inputs: dict[str, Any]) -> Tensor:
    with torch.no_grad():
        return model(**inputs)[0]


def fading(name: str = "bert-cls", norm: str = "adanorm", t: float | None = None) -> nn.Module:
    model = build(name)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        patch_model(model, norm, C=C, k=K, affine="fade", targets="all")
    if t is not None:
        set_fade(model, t)
    return model


# --- the function ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("norm", ["adanorm", "layernorm-simple", "detachnorm"])
@pytest.mark.parametrize("name", ["bert-cls", "gpt2-lm", "convnext", "llama"])
def test_at_0_the_model_equals_the_source(name: str, norm: str) -> None:
    source, model = build(name), fading(name, norm)
    inputs = dummy_inputs(source)
    torch.testing.assert_close(output(model, inputs), output(source, inputs), rtol=0, atol=2e-6)
    if name in ("bert-cls", "gpt2-lm"):
        assert torch.equal(output(model, inputs), output(source, inputs))


@pytest.mark.parametrize("norm", ["adanorm", "layernorm-simple", "detachnorm"])
@pytest.mark.parametrize("name", ["bert-cls", "convnext", "llama"])
def test_at_1_it_equals_a_plain_patched_model_and_finishing_leaves_one(name: str, norm: str) -> None:
    plain, model = build(name), fading(name, norm, 1.0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        patch_model(plain, norm, C=C, k=K, targets="all")
    inputs = dummy_inputs(plain)
    expected = output(plain, inputs)
    torch.testing.assert_close(output(model, inputs), expected, rtol=1e-5, atol=1e-6)
    finish_fading(model)
    assert torch.equal(output(model, inputs), expected)
    assert model.config.adanorm == plain.config.adanorm
    assert model.state_dict().keys() == plain.state_dict().keys()


@given(t=st.floats(0, 1), bias=st.booleans())
def test_in_between_values_and_gradients_follow_the_formula(t: float, bias: bool) -> None:
    torch.manual_seed(0)
    source = nn.LayerNorm(16, bias=bias).double()
    with torch.no_grad():
        for parameter in source.parameters():
            parameter.uniform_(0.3, 1.7)
    block = nn.Sequential(source)
    gain, shift = source.weight.detach(), source.bias.detach() if bias else torch.zeros(16).double()
    patch_model(block, "adanorm", C=C, k=K, affine="fade")
    set_fade(block, t)
    t = float(torch.tensor(t, dtype=torch.float32))  # as it is kept
    x = torch.randn(3, 16, dtype=torch.float64, requires_grad=True)
    z = block(x)
    y = F.layer_norm(x, (16,), None, None, source.eps)
    phi = (1 + t * (C - 1)) * (1 - t * K * y.detach())
    expected = phi * (gain + t * (1 - gain)) * y + (1 - t) * shift
    torch.testing.assert_close(z, expected, rtol=1e-6, atol=1e-6)  # gain and bias of the moment are float32
    weights = torch.linspace(-1, 1, 48, dtype=torch.float64).view(3, 16)
    (have,), (want,) = (torch.autograd.grad((value * weights).sum(), x) for value in (z, expected))
    torch.testing.assert_close(have, want, rtol=1e-6, atol=1e-6)


def test_detachnorm_fades_with_its_own_backward_pass() -> None:
    block = nn.Sequential(nn.LayerNorm(16))
    patch_model(block, "detachnorm", affine="fade")
    x = torch.randn(3, 16, requires_grad=True)
    set_fade(block, 0.5)
    (gradient,) = torch.autograd.grad((block(x) * torch.arange(16.0)).sum(), x)
    plain = nn.Sequential(nn.LayerNorm(16))
    patch_model(plain, "detachnorm")
    (expected,) = torch.autograd.grad((plain(x) * torch.arange(16.0)).sum(), x)
    torch.testing.assert_close(gradient, expected)  # gain 1, bias 0: the gradient is DetachNorm's at every t


def test_gain_and_bias_are_constants() -> None:
    model = fading()
    names = [name for name, _ in model.named_parameters()]
    assert not any("fade" in name or "LayerNorm" in name for name in names)
    assert "bert.embeddings.LayerNorm.fade_gain" in model.state_dict()


# --- progress --------------------------------------------------------------------------------------------------------


def test_schedules_are_pure_functions_of_the_step() -> None:
    assert [fade_at(step, 4, start=2) for step in range(8)] == [0, 0, 0, 0.25, 0.5, 0.75, 1, 1]
    cosine = [fade_at(step, 4, schedule="cosine") for step in range(5)]
    assert cosine[0] == 0.0
    assert cosine[4] == 1.0
    assert cosine[1] == pytest.approx(0.1464, abs=1e-4)
    assert cosine[1] + cosine[3] == pytest.approx(1.0)


@pytest.mark.parametrize(
    ("order", "expected"),
    [
        ("together", [0.5] * 5),
        ("forward", [1.0, 1.0, 0.5, 0.0, 0.0]),
        ("backward", [0.0, 0.0, 0.5, 1.0, 1.0]),
    ],
)
def test_norms_fade_together_or_one_after_the_other(order: Any, expected: list[float]) -> None:
    model = fading()
    set_fade(model, 0.5, order=order)
    assert [float(b) for name, b in model.named_buffers() if name.endswith("fade_progress")] == expected


def test_bad_arguments_raise() -> None:
    model = fading()
    for t in (-0.1, 1.1, float("nan")):
        with pytest.raises(ValueError, match="must lie in"):
            set_fade(model, t)
    with pytest.raises(ValueError, match="order must be"):
        set_fade(model, 0.5, order="sideways")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="has no fading norms"):
        set_fade(build("bert-cls"), 0.5)
    with pytest.raises(ValueError, match="schedule must be"):
        FadeCallback(schedule="step")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="at most 1"):
        FadeCallback(fade_steps=1.5)
    with pytest.raises(ValueError, match='norm="none"'):
        patch_model(build("bert-cls"), "none", affine="fade")


def test_finishing_too_early_raises_and_changes_nothing() -> None:
    model = fading(t=0.9)
    before = model.state_dict().keys()
    with pytest.raises(ValueError, match=r"at t = 0.9 of its fade"):
        finish_fading(model)
    assert model.state_dict().keys() == before


def test_patching_twice_keeps_the_state_and_unpatching_gives_the_source_back() -> None:
    source, model = build("bert-cls"), fading(t=0.5)
    inputs = dummy_inputs(model)
    before = output(model, inputs)
    patch_model(model, "adanorm", C=C, k=K, affine="fade")
    assert torch.equal(output(model, inputs), before)
    patch_model(model, "adanorm", C=1.0, k=0.02, affine="fade")  # other targets, the same way there
    assert not torch.equal(output(model, inputs), before)
    set_fade(model, 0.0)
    assert torch.equal(output(model, inputs), output(source, inputs))
    unpatch_model(model)
    assert torch.equal(output(model, inputs), output(source, inputs))


# --- checkpoints -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_checkpoint_in_the_middle_reloads_exactly(tmp_path: Path, dtype: torch.dtype) -> None:
    model = fading().to(dtype)
    set_fade(model, 1 / 3)
    assert model.bert.embeddings.LayerNorm.fade_progress.dtype == torch.float32
    inputs = dummy_inputs(model)
    model.save_pretrained(tmp_path)
    again, info = type(model).from_pretrained(tmp_path, output_loading_info=True, dtype=dtype)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert float(again.bert.embeddings.LayerNorm.fade_progress) == float(torch.tensor(1 / 3))
    assert torch.equal(output(again.eval(), inputs), output(model, inputs))
    set_fade(again, 1.0)
    finish_fading(again)
    again.save_pretrained(tmp_path / "done")
    last = type(model).from_pretrained(tmp_path / "done", dtype=dtype).eval()
    assert torch.equal(output(last, inputs), output(again, inputs))
    assert "fade" not in str(last.config.adanorm)


def test_k_alone_fades_after_a_fold_and_finishes() -> None:
    model = build("vit")
    inputs = dummy_inputs(model)
    before = output(model, inputs)
    patch_model(model, "adanorm", C=C, k=K, affine="fold")
    torch.testing.assert_close(output(model, inputs), before, rtol=1e-5, atol=1e-6)
    set_fade(model, 1.0)
    arrived = output(model, inputs)
    finish_fading(model)
    torch.testing.assert_close(output(model, inputs), arrived, rtol=1e-5, atol=1e-6)
    assert model.config.adanorm["groups"][0].keys() == {"norm", "modules", "C", "k"}


class Rows(torch.utils.data.Dataset):  # type: ignore[type-arg]
    def __len__(self) -> int:
        return 48

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(index)
        return {"input_ids": torch.randint(4, 100, (6,), generator=generator), "labels": torch.tensor(index % 2)}


def trainer(model: nn.Module, folder: Path, callback: FadeCallback, **options: Any) -> Trainer:
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=6,
        per_device_train_batch_size=4,
        gradient_accumulation_steps=2,
        save_steps=3,
        logging_steps=100,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        **options,
    )
    return Trainer(model, arguments, train_dataset=Rows(), callbacks=[callback])


class Recorder(FadeCallback):
    """Notes the progress after every optimizer step."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.seen: list[float] = []

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        super().on_step_end(args, state, control, model=model)
        self.seen.append(float(model.bert.embeddings.LayerNorm.fade_progress))


def test_trainer_fades_per_optimizer_step_and_a_resumed_run_is_the_same_run(tmp_path: Path) -> None:
    whole, callback = fading(), Recorder(fade_steps=4)
    trainer(whole, tmp_path / "a", callback).train()
    assert callback.seen == [0.0, 0.25, 0.5, 0.75, 1.0, 1.0, 1.0]  # before the first step, then after each
    resumed = type(whole).from_pretrained(tmp_path / "a" / "checkpoint-3")
    assert float(resumed.bert.embeddings.LayerNorm.fade_progress) == 0.75
    again = Recorder(fade_steps=4)
    trainer(resumed, tmp_path / "b", again).train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-3"))
    assert again.seen == [0.75, 1.0, 1.0, 1.0]
    for (name, a), b in zip(whole.state_dict().items(), resumed.state_dict().values(), strict=True):
        assert torch.equal(a, b), name
    finish_fading(whole)


# --- compiled and distributed ----------------------------------------------------------------------------------------


def test_a_compiled_model_is_not_compiled_again_as_t_moves() -> None:
    model = fading("gpt2-lm").train(False)
    graphs = 0

    def backend(graph: Any, example: Any) -> Any:
        nonlocal graphs
        graphs += 1
        return graph.forward

    norm = model.transformer.h[0].ln_1
    compiled = torch.compile(norm, backend=backend, fullgraph=True)
    x = torch.randn(2, 3, 32, requires_grad=True)
    for t in (0.0, 0.25, 0.5, 1.0):
        set_fade(compiled, t)
        set_fade(model, t)
        torch.testing.assert_close(compiled(x), norm(x))
    assert graphs == 1


def trained_together() -> None:
    ids = torch.randint(4, 100, (4, 6), generator=torch.Generator().manual_seed(0))
    labels = torch.tensor([0, 1, 1, 0])
    mine = slice(2 * dist.get_rank(), 2 * dist.get_rank() + 2)

    def train(model: nn.Module, rows: slice) -> None:
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        for step in range(3):
            set_fade(model, fade_at(step, 2))
            model(input_ids=ids[rows], labels=labels[rows]).loss.backward()
            optimizer.step()
            optimizer.zero_grad()

    alone, copied, sharded = (patch_model(build("bert-cls"), "adanorm", affine="fade") for _ in range(3))
    train(alone, slice(4))
    train(nn.parallel.DistributedDataParallel(copied, gradient_as_bucket_view=True), mine)
    mesh = init_device_mesh("cpu", (2,))
    for layer in sharded.bert.encoder.layer:
        fully_shard(layer, mesh=mesh)
    train(fully_shard(sharded, mesh=mesh), mine)
    full = {k: v.full_tensor() if hasattr(v, "full_tensor") else v for k, v in sharded.state_dict().items()}
    for name, value in alone.state_dict().items():
        torch.testing.assert_close(copied.state_dict()[name], value, rtol=0, atol=1e-5)
        torch.testing.assert_close(full[name], value, rtol=0, atol=1e-5)


def test_two_processes_fade_as_one_under_ddp_and_fsdp2(tmp_path: Path) -> None:
    together(trained_together, tmp_path)


# --- what is told and refused ----------------------------------------------------------------------------------------


def test_numbers_are_taken_as_numbers_and_nothing_else() -> None:
    model = fading()
    set_fade(model, torch.tensor(0.25))
    assert {float(m.fade_progress) for m in model.modules() if getattr(m, "fade", None)} == {0.25}
    for t in ("0.5", None, True):
        with pytest.raises(TypeError, match="t must be a number"):
            set_fade(model, t)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="fade_steps must be a finite number"):
        FadeCallback(fade_steps=float("nan"))
    with pytest.raises(ValueError, match="order must be"):
        FadeCallback(order="sideways")  # type: ignore[arg-type]


def test_fading_norms_that_are_swapped_already_is_refused() -> None:
    model = patch_model(build("bert-cls"), "adanorm")
    before = model.state_dict().keys()
    with pytest.raises(ValueError, match="nothing to fade"):
        patch_model(model, "adanorm", affine="fade")
    assert model.state_dict().keys() == before


def test_dropping_in_the_middle_of_a_fade_warns() -> None:
    with pytest.warns(UserWarning, match="the fade of 5 norms ends here"):
        patch_model(fading(t=0.3), "adanorm")


def test_unpatching_a_reloaded_model_in_the_middle_of_a_fade_gives_its_gains_back(tmp_path: Path) -> None:
    model = fading(t=0.4)
    gain = model.bert.embeddings.LayerNorm.fade_gain.clone()
    model.save_pretrained(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # nothing is lost, so nothing is said
        again = unpatch_model(type(model).from_pretrained(tmp_path))
    assert torch.equal(again.bert.embeddings.LayerNorm.weight, gain)


def test_a_fade_that_would_not_arrive_is_told_at_the_start(tmp_path: Path) -> None:
    callback = FadeCallback(20)
    with pytest.warns(UserWarning, match=r"will stand at t = 0\.5 after the last of 10 steps"):
        callback.on_train_begin(None, SimpleNamespace(max_steps=10, global_step=0), None, model=fading())


def test_numpy_counts_are_counts() -> None:
    assert FadeCallback(np.int64(10)).progress(step=10, max_steps=100) == 1.0
    with pytest.raises(ValueError, match="at most 1"):
        FadeCallback(np.float32(300))


# ------------------------------------------------------------------------------------------- a fade that nobody moves


@pytest.fixture
def unsaid():
    modeling_adanorm.warn_of_still_fade.cache_clear()


def waiting(affine: str) -> nn.Module:
    torch.manual_seed(0)
    sizes = {"n_embd": 8, "n_layer": 1, "n_head": 1, "vocab_size": 16, "n_positions": 8}
    return patch_model(GPT2LMHeadModel(GPT2Config(**sizes)), "adanorm", affine=affine, C=1.5)


@pytest.mark.parametrize("affine", ["fold", "fade"])
def test_training_that_never_moves_a_fade_is_told_once(affine, unsaid):
    norm = waiting(affine).transformer.ln_f.train()
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        for _ in range(3 * modeling_adanorm.PATIENCE):
            norm(torch.ones(1, 8))
    (only,) = map(str, (warning.message for warning in said))
    assert "FadeCallback" in only
    assert "set_fade(model, t)" in only


def test_training_that_moves_the_fade_is_told_nothing(unsaid):
    model = waiting("fold")
    norm = model.transformer.ln_f.train()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for step in range(3 * modeling_adanorm.PATIENCE):
            norm(torch.ones(1, 8))
            if step % 50 == 0:  # many passes to a step, and a fade that begins late
                set_fade(model, 0.0)


@pytest.mark.parametrize("wrap", [lambda model: model, torch.compile], ids=["eager", "compiled"])
def test_saving_a_fade_that_nothing_has_moved_is_told_once(wrap, tmp_path, unsaid):
    model = wrap(waiting("fade"))
    with pytest.warns(UserWarning, match="FadeCallback"):
        model.save_pretrained(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.save_pretrained(tmp_path)
    modeling_adanorm.warn_of_still_fade.cache_clear()
    set_fade(model, 0.0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.save_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("affine", "t", "said"),
    [
        ("fold", 0.0, "C=1 -> 1.5, k=0 -> 0.1, ramp at 0 %)"),
        ("fold", 0.25, "C=1.125 -> 1.5, k=0.025 -> 0.1, ramp at 25 %)"),
        ("fade", 1.0, "C=1.5 -> 1.5, k=0.1 -> 0.1, fade of gain and bias at 100 %)"),
    ],
)
def test_a_norm_says_what_it_computes_now_and_where_it_goes(affine, t, said):
    model = waiting(affine)
    set_fade(model, t)
    assert repr(model.transformer.ln_f).endswith(said)
    assert inspect_model(model, layers=0).table()[0][3].endswith(said)
