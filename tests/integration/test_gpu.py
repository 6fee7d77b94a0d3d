"""Check on a GPU: exactness, CUDA graphs, determinism, memory, launchers and recipes.

`make gpu-check` runs these tests, those of the Triton kernels, and the benchmark.
`GPU_CHECK_DEVICE=cpu python -m pytest tests/integration/test_gpu.py` shows whether the tests themselves run.
"""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import BertConfig, BertForMaskedLM

from hf_adanorm import is_patched, patch_model
from hf_adanorm.kernels import fused
from tests.zoo.formulas import IDS, NORMS, SIMPLE, derivatives, leaf, make, random, reference, saved_bytes

ROOT = Path(__file__).resolve().parents[2]
DEVICE = torch.device(os.environ.get("GPU_CHECK_DEVICE", "cuda"))
ON_GPU = DEVICE.type == "cuda"
EPS = 1e-5
STEPS = 20  # of the training under each launcher

pytestmark = pytest.mark.skipif(ON_GPU and not torch.cuda.is_available(), reason="needs a CUDA GPU")
needs_gpu = pytest.mark.skipif(not ON_GPU, reason="needs a CUDA GPU")
every_norm = pytest.mark.parametrize("norm", NORMS, ids=IDS)


@pytest.fixture(params=["torch", "triton"])
def kernels(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Compute the norms by torch's operators, then by the Triton kernels."""
    if request.param == "triton":
        if not ON_GPU:
            pytest.skip("needs a CUDA GPU")
        pytest.importorskip("triton")
        from hf_adanorm.kernels import triton

        monkeypatch.setitem(fused.BACKENDS, "cuda", triton)
    return str(request.param)


def gradient(function: Callable[[Tensor], Tensor], x: Tensor, dz: Tensor) -> tuple[Tensor, Tensor]:
    """Return the output and dl/dx."""
    x = leaf(x)
    z = function(x)
    return z.detach(), torch.autograd.grad(z, x, dz.to(z.dtype))[0]


def errors(module: nn.Module, norm: Any, x: Tensor, dz: Tensor, autocast: torch.dtype | None) -> list[float]:
    """Return the relative errors of output and gradient against the float64 formula of `norm`."""
    exact = leaf(x.double())
    expected = reference(norm, exact, (-1,), EPS)
    (dx,) = torch.autograd.grad(expected, exact, dz.double())
    with torch.autocast(DEVICE.type, dtype=autocast, enabled=autocast is not None):
        found = gradient(module, x.to(DEVICE), dz.to(DEVICE))
    pairs = zip(found, (expected.detach(), dx), strict=True)
    return [((value.double().cpu() - right).abs().max() / right.abs().max()).item() for value, right in pairs]


# ----------------------------------------------------------------------------------------------------------- norms


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@every_norm
def test_norms_are_as_exact_as_nn_layernorm(norm: Any, dtype: torch.dtype, autocast: bool, kernels: str) -> None:
    mode = dtype if autocast and dtype != torch.float32 else None
    for width in (64, 768, 4096, 20_000):
        x, dz = (random(64, width) * 3 + 1).to(dtype), random(64, width, seed=1).to(dtype)
        stock = nn.LayerNorm(width, EPS, device=DEVICE, dtype=torch.float32 if mode else dtype)
        allowed = [error + 2 * torch.finfo(dtype).eps for error in errors(stock, SIMPLE, x, dz, mode)]
        found = errors(make(norm, width, EPS).to(DEVICE), norm, x, dz, mode)
        assert all(error <= most for error, most in zip(found, allowed, strict=True)), (width, found, allowed)


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@every_norm
def test_output_has_the_dtype_of_nn_layernorm(norm: Any, dtype: torch.dtype, autocast: bool, kernels: str) -> None:
    x = leaf(random(3, 64).to(DEVICE, dtype))
    with torch.autocast(DEVICE.type, dtype=torch.bfloat16, enabled=autocast):
        expected = nn.LayerNorm(64, device=DEVICE, dtype=None if autocast else dtype)(x).dtype
        assert make(norm, 64, EPS).to(DEVICE)(x).dtype == expected


@every_norm
def test_double_backward(norm: Any, kernels: str) -> None:
    x, dz, v = (random(6, 48, seed=seed).to(DEVICE) for seed in range(3))
    expected = derivatives(functools.partial(reference, norm, dims=(-1,), eps=EPS), x, dz, v)
    found = derivatives(make(norm, 48, EPS).to(DEVICE), x.float(), dz.float(), v.float())
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-3, atol=1e-4)


@every_norm
def test_compiled_norm_equals_eager(norm: Any, kernels: str) -> None:
    torch._dynamo.reset()
    x, dz = (random(256, 768, seed=seed).to(DEVICE, torch.float32) for seed in (0, 1))
    module = make(norm, 768, EPS).to(DEVICE)
    compiled = torch.compile(module, fullgraph=True)
    torch.testing.assert_close(gradient(compiled, x, dz), gradient(module, x, dz), rtol=1e-4, atol=1e-5)


@needs_gpu
@every_norm
def test_cuda_graph_equals_eager(norm: Any, kernels: str) -> None:
    module = make(norm, 768, EPS).to(DEVICE)
    x, other = (random(256, 768, seed=seed).float().to(DEVICE) for seed in (0, 1))
    graphed = torch.cuda.make_graphed_callables(module.forward, (leaf(x),))  # it would change a module
    for value in (x, other):
        torch.testing.assert_close(gradient(graphed, value, x), gradient(module, value, x), rtol=0, atol=0)


@every_norm
def test_channels_last_layout(norm: Any, kernels: str) -> None:
    x, dz = (random(4, 64, 14, 14, seed=seed).float().to(DEVICE) for seed in (0, 1))
    module = make(norm, 64, EPS, channels_first=True).to(DEVICE)
    found = gradient(module, *(t.contiguous(memory_format=torch.channels_last) for t in (x, dz)))
    torch.testing.assert_close(found, gradient(module, x, dz))


@every_norm
def test_norms_are_deterministic(norm: Any, kernels: str) -> None:
    x, dz = (random(4096, 768, seed=seed).float().to(DEVICE) for seed in (0, 1))
    module = make(norm, 768, EPS).to(DEVICE)
    torch.testing.assert_close(gradient(module, x, dz), gradient(module, x, dz), rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@every_norm
def test_no_more_is_saved_for_the_backward_pass_than_by_nn_layernorm(
    norm: Any, dtype: torch.dtype, kernels: str
) -> None:
    x = leaf(random(4096, 1024).to(DEVICE, dtype))
    most = saved_bytes(nn.LayerNorm(1024, device=DEVICE, dtype=dtype), x)
    assert saved_bytes(make(norm, 1024, EPS).to(DEVICE), x) <= most + 1024 * 4  # on a CPU, a row of ones


# ---------------------------------------------------------------------------------------------------------- models


def bert() -> tuple[BertForMaskedLM, dict[str, Tensor]]:
    """Return a small AdaNorm BERT without dropout, and a batch."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 128, "num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 256}
    config = BertConfig(
        vocab_size=512, attn_implementation="eager", hidden_dropout_prob=0, attention_probs_dropout_prob=0, **sizes
    )
    tokens = torch.randint(5, 512, (16, 64)).to(DEVICE)
    return patch_model(BertForMaskedLM(config)).to(DEVICE), {"input_ids": tokens, "labels": tokens}


def train(model: nn.Module, batch: dict[str, Tensor], steps: int) -> list[float]:
    """Train in bfloat16 and return the losses."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=ON_GPU)
    losses = []
    model.train()
    for _ in range(steps):
        with torch.autocast(DEVICE.type, dtype=torch.bfloat16):
            loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def test_training_is_deterministic(kernels: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # for deterministic matrix products
    torch.use_deterministic_algorithms(True)
    try:
        assert train(*bert(), 5) == train(*bert(), 5)
    finally:
        torch.use_deterministic_algorithms(False)


@needs_gpu
def test_training_on_triton_has_the_losses_of_torchs_operators(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    from hf_adanorm.kernels import triton

    expected = train(*bert(), STEPS)
    monkeypatch.setitem(fused.BACKENDS, "cuda", triton)
    assert train(*bert(), STEPS) == pytest.approx(expected, abs=0.05)


def test_trained_model_saves_and_loads(tmp_path: Path) -> None:
    model, batch = bert()
    train(model, batch, 3)
    model.eval().save_pretrained(tmp_path)
    loaded = BertForMaskedLM.from_pretrained(tmp_path, attn_implementation="eager").to(DEVICE).eval()
    assert is_patched(loaded)
    with torch.no_grad():
        assert torch.equal(loaded(**batch).logits, model(**batch).logits)


# --------------------------------------------------------------------------------------------- launchers and recipes


def launch(config: str, *command: str) -> None:
    """Run a script by accelerate with a file of recipes/launch, in one process."""
    pytest.importorskip("accelerate")
    accelerate = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", f"recipes/launch/{config}.yaml"]
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    done = subprocess.run(
        [*accelerate, "--num_processes", "1", *command],
        capture_output=True, text=True, cwd=ROOT, env={**os.environ, "PYTHONPATH": path}, timeout=180, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-1000:] + done.stderr[-2000:]


@needs_gpu
def test_ddp_and_fsdp2_have_the_losses_of_a_plain_run(tmp_path: Path) -> None:
    losses = {}
    for config in ("one_gpu", "ddp_8_gpus", "fsdp2"):
        launch(config, __file__, str(tmp_path / config))
        losses[config] = json.loads((tmp_path / config / "losses.json").read_text())
        assert is_patched(BertForMaskedLM.from_pretrained(tmp_path / config)), config
    assert losses["one_gpu"][-1] < losses["one_gpu"][0]
    for found in losses.values():
        assert found == pytest.approx(losses["one_gpu"], abs=0.15)  # FSDP2 computes the loss itself in bfloat16


def train_and_save(folder: Path) -> None:
    """Train under the launcher that started this process, and write the model and its losses."""
    from accelerate import Accelerator

    accelerator = Accelerator()
    model, batch = bert()
    model, optimizer = accelerator.prepare(model, torch.optim.AdamW(model.parameters(), lr=1e-3))
    losses = []
    for _ in range(STEPS):
        loss = model(**batch).loss
        accelerator.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    state = accelerator.get_state_dict(model)
    accelerator.unwrap_model(model).save_pretrained(folder, state_dict=state)
    (folder / "losses.json").write_text(json.dumps(losses))
    accelerator.end_training()


@needs_gpu
@pytest.mark.parametrize("compiled", ["false", "true"])
@pytest.mark.parametrize(("recipe", "config"), [("classification", "demo"), ("translation", "demo_en_de")])
def test_recipe_trains_in_bfloat16(recipe: str, config: str, compiled: str, tmp_path: Path) -> None:
    options = ["--config", f"recipes/configs/{config}.yaml", "--max_steps", "100", "--mixed_precision", "bf16"]
    options += ["--compile", compiled, "--fused_adam", "true", "--output_dir", str(tmp_path / "run")]
    launch("one_gpu", f"recipes/{recipe}.py", *options)
    assert (tmp_path / "run" / "results.json").is_file()


if __name__ == "__main__":
    train_and_save(Path(sys.argv[1]))
