"""Everything that can only be known on a GPU, in one command and under eight minutes.

    make gpu-check                                      from a checkout, nothing needs to be installed from it
    python tests/campaigns/gpu_check.py --device cpu    whether the harness runs; what needs a GPU is left out

Needs torch >= 2.11, transformers >= 5.17 and accelerate; what else is missing (Triton, Liger, the recipes' packages)
is left out with a word. One line for every check, then the tables of speed; all of it in OUTPUT_DIR/gpu-check.txt,
too. Ends with code 1 if a check fails, 2 without a GPU.

Speed is given as GB/s of the tensors that have to be moved (forward x and z; backward x, dz and dx), and as the share
of the memory's peak bandwidth. The bar for the Triton kernels to become the default: at 4096 x {1024, 4096}, float32
and bfloat16, forward and backward take at most 0.6 of what nn.LayerNorm takes, and less than torch's operators.
"""

from __future__ import annotations

import argparse
import functools
import importlib.util
import json
import math
import os
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT)]
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # for deterministic matrix products
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch  # noqa: E402
import transformers as tf  # noqa: E402
from hf_adanorm.bench.contenders import SIZES  # noqa: E402
from hf_adanorm.bench.measure import bench_models, peak_bytes, saved_bytes  # noqa: E402
from hf_adanorm.bench.timing import summarize, take_turns  # noqa: E402
from torch import Tensor, nn  # noqa: E402

from hf_adanorm import AdaNorm, is_patched, modeling_adanorm, patch_model  # noqa: E402
from tests.zoo.formulas import ADANORM, NORMS, SIMPLE, derivatives, leaf, make, random, reference  # noqa: E402

EPS = 1e-5
BAR = 0.6
STEPS = 20  # of the training under each launcher


class LeftOutError(Exception):
    """The check cannot be made here."""


@dataclass(frozen=True)
class Place:
    device: torch.device
    folder: Path
    """For what a check writes."""

    @property
    def on_gpu(self) -> bool:
        return self.device.type == "cuda"

    @property
    def patience(self) -> int:
        """Seconds that a process which is launched may take."""
        return 180 if self.on_gpu else 600


def need_gpu(place: Place) -> None:
    if not place.on_gpu:
        raise LeftOutError("needs a GPU")


def triton_kernel() -> Any:
    if importlib.util.find_spec("triton") is None:
        raise LeftOutError("Triton is not installed")
    from hf_adanorm import triton_kernel

    return triton_kernel


class OnTriton(nn.Module):
    """A norm on the Triton kernels, whatever the switch says."""

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.norm = norm
        self.kernel = triton_kernel()

    def forward(self, x: Tensor) -> Tensor:
        before, modeling_adanorm.gpu_kernel = modeling_adanorm.gpu_kernel, self.kernel
        try:
            return self.norm(x)
        finally:
            modeling_adanorm.gpu_kernel = before


def variants(norm: tuple[str, dict[str, Any]], width: int, place: Place, **layout: Any) -> Iterator[nn.Module]:
    """The norm on torch's operators, and on Triton where that can be had."""
    yield make(norm, width, EPS, **layout).to(place.device)
    if place.on_gpu and importlib.util.find_spec("triton") is not None:
        yield OnTriton(make(norm, width, EPS, **layout).to(place.device))


def gradient(function: Callable[[Tensor], Tensor], x: Tensor, dz: Tensor) -> tuple[Tensor, Tensor]:
    x = leaf(x)
    z = function(x)
    return z.detach(), torch.autograd.grad(z, x, dz.to(z.dtype))[0]


def errors(
    module: Callable[[Tensor], Tensor],
    norm: tuple[str, dict[str, Any]],
    x: Tensor,
    dz: Tensor,
    place: Place,
    autocast: torch.dtype | None,
) -> list[float]:
    """Of the output and of the gradient, against the float64 formula of `norm` on a CPU."""
    exact = leaf(x.double())
    expected = reference(norm, exact, (-1,), EPS)
    (dx,) = torch.autograd.grad(expected, exact, dz.double())
    with torch.autocast(place.device.type, dtype=autocast, enabled=autocast is not None):
        ours = gradient(module, x.to(place.device), dz.to(place.device))
    return [relative(value, exact) for value, exact in zip(ours, (expected.detach(), dx), strict=True)]


def relative(value: Tensor, exact: Tensor) -> float:
    return ((value.double().cpu() - exact).abs().max() / exact.abs().max()).item()


# ------------------------------------------------------------------------------------------------------- checks


def check_exactness(place: Place) -> str:
    """Outputs and gradients against float64: no further off than nn.LayerNorm's, or a unit in the last place."""
    worst = 0.0
    cases = [(dtype, None) for dtype in (torch.float32, torch.bfloat16, torch.float16)]
    cases += [(dtype, dtype) for dtype in (torch.bfloat16, torch.float16)]
    for width in (64, 768, 4096, 20_000):
        for dtype, autocast in cases:
            x, dz = (random(64, width) * 3 + 1).to(dtype), random(64, width, seed=1).to(dtype)
            stock = nn.LayerNorm(width, EPS, device=place.device, dtype=torch.float32 if autocast else dtype)
            allowed = [error + 2 * torch.finfo(dtype).eps for error in errors(stock, SIMPLE, x, dz, place, autocast)]
            for norm in NORMS:
                for module in variants(norm, width, place):
                    for error, most in zip(errors(module, norm, x, dz, place, autocast), allowed, strict=True):
                        assert error <= most, (
                            f"{norm[0]}, {dtype}, autocast {autocast}, {width}: {error:.1e} > {most:.1e}"
                        )
                        worst = max(worst, error / most)
    return f"at most {worst:.2f} of what is allowed"


def check_dtypes(place: Place) -> str:
    """With and without autocast the output has nn.LayerNorm's dtype."""
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        for enabled in (False, True):
            x = leaf(random(3, 64).to(place.device, dtype))
            with torch.autocast(place.device.type, dtype=torch.bfloat16, enabled=enabled):
                expected = nn.LayerNorm(64, device=place.device, dtype=None if enabled else dtype)(x).dtype
                for norm in NORMS:
                    for module in variants(norm, 64, place):
                        assert module(x).dtype == expected, (norm, dtype, enabled)
    return ""


def check_double_backward(place: Place) -> str:
    x, dz, v = (random(6, 48, seed=seed).to(place.device) for seed in range(3))
    for norm in NORMS:
        expected = derivatives(functools.partial(reference, norm, dims=(-1,), eps=EPS), x, dz, v)
        for a, b in zip(derivatives(make(norm, 48, EPS), x, dz, v), expected, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-10)
        for module in variants(norm, 48, place):
            for a, b in zip(derivatives(module, x.float(), dz.float(), v.float()), expected, strict=True):
                torch.testing.assert_close(a.double(), b, rtol=1e-3, atol=1e-4)
    return ""


def check_compile(place: Place) -> str:
    torch._dynamo.reset()
    x, dz = random(256, 768).to(place.device, torch.float32), random(256, 768, seed=1).to(place.device, torch.float32)
    for norm in NORMS:
        module = make(norm, 768, EPS).to(place.device)
        compiled = torch.compile(module, fullgraph=True)
        torch.testing.assert_close(gradient(compiled, x, dz), gradient(module, x, dz), rtol=1e-4, atol=1e-5)
    if place.on_gpu:  # the operator of torch's library, inlined by nobody
        layer = triton_kernel().layers.AdaNorm
        module = make(ADANORM, 768, EPS).to(place.device)
        compiled = torch.compile(functools.partial(layer.forward, module), fullgraph=True)
        torch.testing.assert_close(gradient(compiled, x, dz), gradient(module, x, dz), rtol=1e-4, atol=1e-5)
    return ""


def check_cuda_graphs(place: Place) -> str:
    need_gpu(place)
    for norm in NORMS:
        for module in variants(norm, 768, place):
            x, other = (random(256, 768, seed=seed).float().to(place.device) for seed in (0, 1))
            graphed = torch.cuda.make_graphed_callables(module.forward, (leaf(x),))  # a module would be changed
            for value in (x, other):
                torch.testing.assert_close(gradient(graphed, value, x), gradient(module, value, x), rtol=0, atol=0)
    return ""


def check_channels_last(place: Place) -> str:
    x, dz = (random(4, 64, 14, 14, seed=seed).float().to(place.device) for seed in (0, 1))
    for norm in NORMS:
        for module in variants(norm, 64, place, channels_first=True):
            expected = gradient(module, x, dz)
            ours = gradient(module, *(t.contiguous(memory_format=torch.channels_last) for t in (x, dz)))
            torch.testing.assert_close(ours, expected)
    return ""


def bert(place: Place, norm: str | None = "adanorm", **sizes: int) -> tuple[nn.Module, dict[str, Tensor]]:
    torch.manual_seed(0)
    shape = {"hidden_size": 128, "num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 256} | sizes
    model = tf.BertForMaskedLM(tf.BertConfig(vocab_size=512, attn_implementation="eager", **shape))
    if norm is not None:
        patch_model(model, norm)
    tokens = torch.randint(5, 512, (16, 64))
    return model.to(place.device), {"input_ids": tokens.to(place.device), "labels": tokens.to(place.device)}


def losses_of(model: nn.Module, batch: dict[str, Tensor], steps: int, device: torch.device) -> list[float]:
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=device.type == "cuda")
    losses = []
    model.train()
    for _ in range(steps):
        with torch.autocast(device.type, dtype=torch.bfloat16):
            loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def check_determinism(place: Place) -> str:
    for norm in NORMS:
        for module in variants(norm, 768, place):
            x, dz = (random(4096, 768, seed=seed).float().to(place.device) for seed in (0, 1))
            first, second = gradient(module, x, dz), gradient(module, x, dz)
            assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True)), norm
    torch.use_deterministic_algorithms(True)
    try:
        runs = []
        for _ in range(2):
            model, batch = bert(place)
            torch.manual_seed(1)  # of dropout
            runs.append(losses_of(model, batch, 5, place.device))
        assert runs[0] == runs[1], runs
    finally:
        torch.use_deterministic_algorithms(False)
    return ""


def check_training_on_triton(place: Place) -> str:
    """A model trains with the kernels as it does without."""
    need_gpu(place)
    kernel = triton_kernel()
    runs = []
    for on in (False, True):
        kernel.enable(on)
        try:
            model, batch = bert(place, hidden_dropout_prob=0, attention_probs_dropout_prob=0)
            runs.append(losses_of(model, batch, STEPS, place.device))
        finally:
            kernel.enable(False)
    furthest = max(abs(a - b) for a, b in zip(*runs, strict=True))
    assert furthest < 0.05, runs
    return f"losses within {furthest:.4f} over {STEPS} steps"


def check_save_and_load(place: Place) -> str:
    model, batch = bert(place)
    losses_of(model, batch, 3, place.device)
    model.eval().save_pretrained(place.folder / "saved")
    loaded = tf.BertForMaskedLM.from_pretrained(place.folder / "saved", attn_implementation="eager")
    loaded = loaded.to(place.device).eval()
    assert is_patched(loaded)
    with torch.no_grad():
        assert torch.equal(loaded(**batch).logits, model(**batch).logits)
    return ""


def check_memory(place: Place) -> str:
    """What is saved for the backward pass is at most what nn.LayerNorm saves."""
    said = []
    for dtype in (torch.float32, torch.bfloat16):
        x, dz = (random(4096, 1024, seed=seed).to(place.device, dtype) for seed in (0, 1))
        x.requires_grad_()
        stock = nn.LayerNorm(1024, device=place.device, dtype=dtype)
        most = saved_bytes(stock, x), peak_bytes(functools.partial(gradient, stock, x, dz), place.device)
        for norm in NORMS:
            for module in variants(norm, 1024, place):
                ours = saved_bytes(module, x), peak_bytes(functools.partial(gradient, module, x, dz), place.device)
                assert ours[0] <= most[0] + 1024 * 4, (norm, dtype, ours, most)  # on a CPU, a row of ones
                said.append(ours[1] / most[1])
    return f"peak {min(said):.2f} to {max(said):.2f} of nn.LayerNorm's"


def run(command: list[str], place: Place) -> None:
    """Raises LeftOutError for a package that is missing, AssertionError with the end of the output for a failure."""
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])  # nothing is installed
    environment = {**os.environ, "PYTHONPATH": path}
    with tempfile.TemporaryFile("w+") as log:
        process = subprocess.Popen(
            command, stdout=log, stderr=subprocess.STDOUT, cwd=ROOT, env=environment, start_new_session=True
        )
        try:
            code = process.wait(place.patience)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)  # what it launched, too
            code = process.wait()
        log.seek(0)
        said = log.read()
    for missing in ("No module named ", "error: not installed: "):
        if code and missing in said:
            raise LeftOutError(said[said.rindex(missing) :].splitlines()[0])
    assert code == 0, f"{' '.join(command)}: code {code}\n{said[-2000:]}"


def launcher(place: Place, file: str) -> list[str]:
    accelerate = [sys.executable, "-m", "accelerate.commands.launch"]
    if not place.on_gpu:
        return [*accelerate, "--cpu", "--num_processes", "1", "--num_machines", "1", "--mixed_precision", "bf16"]
    return [*accelerate, "--config_file", f"recipes/launch/{file}", "--num_processes", "1"]


def check_launchers(place: Place) -> str:
    """One process with nccl under accelerate's own DDP and FSDP2: the losses of a plain run, and a model to reload."""
    if importlib.util.find_spec("accelerate") is None:
        raise LeftOutError("accelerate is not installed")
    losses = {}
    for name in ("one_gpu", "ddp_8_gpus", "fsdp2"):
        folder = place.folder / name
        run([*launcher(place, f"{name}.yaml"), str(Path(__file__)), "--train", str(folder)], place)
        losses[name] = json.loads((folder / "losses.json").read_text())
        assert is_patched(tf.BertForMaskedLM.from_pretrained(folder)), name
    assert all(each[-1] < each[0] for each in losses.values()), losses
    furthest = max(abs(a - b) for each in losses.values() for a, b in zip(each, losses["one_gpu"], strict=True))
    assert furthest < 0.15, losses  # FSDP2 computes the loss itself in bfloat16
    return f"losses within {furthest:.4f}"


def train(folder: Path) -> None:
    """What `check_launchers` launches: a patched model under whatever the launcher's file says."""
    from accelerate import Accelerator

    accelerator = Accelerator()
    place = Place(accelerator.device, folder)
    model, batch = bert(place, hidden_dropout_prob=0, attention_probs_dropout_prob=0)
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


def check_recipes(place: Place) -> str:
    """100 steps of the recipes with embedded data, in bfloat16, AdamW fused, the model compiled and not."""
    few = [] if place.on_gpu else ["--max_validation_samples", "16", "--max_test_samples", "16"]
    steps = "100" if place.on_gpu else "3"
    said = []
    for recipe, config in (("classification", "demo"), ("translation", "demo_en_de")):
        for compiled in ("false", "true") if place.on_gpu else ("false",):
            folder = place.folder / f"{recipe}-{compiled}"
            options = [f"recipes/{recipe}.py", "--config", f"recipes/configs/{config}.yaml", "--max_steps", steps]
            options += ["--mixed_precision", "bf16", "--compile", compiled, "--fused_adam", "true", *few]
            began = time.monotonic()
            run([*launcher(place, "one_gpu.yaml"), *options, "--output_dir", str(folder)], place)
            assert (folder / "results.json").is_file()
            said.append(f"{recipe}{' compiled' * (compiled == 'true')} {time.monotonic() - began:.0f} s")
    return ", ".join(said)


CHECKS: tuple[Callable[[Place], str], ...] = (
    check_exactness,
    check_dtypes,
    check_double_backward,
    check_compile,
    check_cuda_graphs,
    check_channels_last,
    check_determinism,
    check_training_on_triton,
    check_save_and_load,
    check_memory,
    check_launchers,
    check_recipes,
)

# -------------------------------------------------------------------------------------------------------- speed


def peak_bandwidth(device: torch.device) -> float | None:
    """GB/s of the memory by its clock and width, as the driver gives them."""
    if device.type != "cuda":
        return None
    about = torch.cuda.get_device_properties(device)
    clock, width = (getattr(about, name, 0) for name in ("memory_clock_rate", "memory_bus_width"))
    return 2 * clock * 1e3 * width / 8 / 1e9 if clock and width else None


def contenders(width: int, dtype: torch.dtype, device: torch.device) -> dict[str, Callable[[Tensor], Tensor]]:
    stock = nn.LayerNorm(width, device=device, dtype=dtype)
    ada = AdaNorm(width).to(device)
    functions: dict[str, Callable[[Tensor], Tensor]] = {"layernorm": stock, "adanorm": ada}
    if device.type == "cuda":
        functions["layernorm compiled"] = torch.compile(nn.LayerNorm(width, device=device, dtype=dtype))
        functions["adanorm compiled"] = torch.compile(AdaNorm(width).to(device))
        if importlib.util.find_spec("triton") is not None:
            functions["adanorm triton"] = OnTriton(ada)
            functions["detachnorm triton"] = OnTriton(modeling_adanorm.DetachNorm(width).to(device))
            functions["layernorm-simple triton"] = OnTriton(modeling_adanorm.LayerNormSimple(width).to(device))
        if importlib.util.find_spec("liger_kernel") is not None:
            from liger_kernel.transformers import LigerLayerNorm

            functions["layernorm liger"] = LigerLayerNorm(width, eps=EPS).to(device, dtype)
    return functions


def step(function: Callable[[Tensor], Tensor], x: Tensor, dz: Tensor) -> None:
    parameters = list(function.parameters()) if isinstance(function, nn.Module) else []
    torch.autograd.grad(function(x), [x, *parameters], dz)


def speed_of_operators(place: Place) -> Iterator[str]:
    peak = peak_bandwidth(place.device)
    rows = 4096 if place.on_gpu else 64
    verdicts = []
    for dtype in (torch.float32, torch.bfloat16):
        for width in (1024, 4096):
            torch._dynamo.reset()
            x = leaf(torch.randn(rows, width, device=place.device).to(dtype))
            dz = torch.randn_like(x)
            functions = contenders(width, dtype, place.device)
            both = {name: functools.partial(step, f, x, dz) for name, f in functions.items()}
            forward = {name: functools.partial(f, x) for name, f in functions.items()}
            copying = {"copy": functools.partial(torch.empty_like(dz).copy_, dz)}
            copied = min(take_turns(copying, place.device, 10, 5e-3)["copy"])
            one = x.numel() * x.element_size() / 1e9
            shares = f", peak {peak:.0f} GB/s" if peak else ""
            yield f"{rows} x {width}, {dtype}: a copy takes {2 * one / copied:.0f} GB/s{shares}"
            for task, calls, tensors in (("forward", forward, 2), ("forward + backward", both, 5)):
                times = summarize(take_turns(calls, place.device, 20, 5e-3))
                for name, row in times.items():
                    rate = tensors * one / row["seconds"]
                    share = f", {rate / peak:.0%} of the peak" if peak else ""
                    yield (
                        f"  {task:18}  {name:23}  {row['seconds'] * 1e6:8.1f} us  {row['ratio']:5.2f} "
                        f"[{row['ratio_low']:.2f}, {row['ratio_high']:.2f}]  {rate:6.0f} GB/s{share}"
                    )
                if tensors == 5 and "adanorm triton" in times:
                    ratio = times["adanorm triton"]["ratio"]
                    verdicts.append(ratio <= BAR and ratio < times["adanorm"]["ratio"])
    if verdicts:
        yield f"the bar of {BAR} of nn.LayerNorm is {'met' if all(verdicts) else 'not met'} by the Triton kernels"


def speed_of_models(place: Place) -> Iterator[str]:
    size, models = ("base", ("bert", "gpt2")) if place.on_gpu else ("tiny", ("bert",))
    results = bench_models(
        device=place.device,
        size=SIZES[size],
        models=models,
        modes=("eager",),
        norms={"eager": ["layernorm", "adanorm"]},
        dtype=torch.bfloat16 if place.on_gpu else torch.float32,
        rounds=6 if place.on_gpu else 2,
    )
    for row in results:
        if row.norm != "layernorm":
            quartiles = f"[{row.ratio_low:.3f}, {row.ratio_high:.3f}]"
            peak = (row.bytes or math.nan) / 2**20
            yield (
                f"  {row.case:6}  {row.task:14}  {row.ratio:.3f} {quartiles} of nn.LayerNorm, "
                f"{row.tokens_per_second:,.0f} tokens/s, peak {peak:,.0f} MiB"
            )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda", help="cpu shows that the harness runs")
    parser.add_argument("--output_dir", type=Path, default=ROOT / "outputs")
    parser.add_argument("--train", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.train:
        train(options.train)
        return 0
    tf.utils.logging.disable_progress_bar()
    device = torch.device(options.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        print(
            f"error: torch {torch.__version__} sees no CUDA GPU here; --device cpu tries the harness", file=sys.stderr
        )
        return 2
    options.output_dir.mkdir(parents=True, exist_ok=True)
    failed = 0
    began = time.monotonic()
    with (
        (options.output_dir / "gpu-check.txt").open("w", encoding="utf-8") as file,
        tempfile.TemporaryDirectory() as folder,
    ):

        def say(line: str) -> None:
            print(line, flush=True)
            print(line, file=file, flush=True)

        place = Place(device, Path(folder))
        name = torch.cuda.get_device_name(device) if place.on_gpu else "CPU"
        say(f"{name}, torch {torch.__version__}, transformers {tf.__version__}, Python {sys.version.split()[0]}")
        for check in CHECKS:
            start = time.monotonic()
            try:
                verdict, said = "ok", check(place)
            except LeftOutError as reason:
                verdict, said = "left out", str(reason)
            except Exception:
                verdict, said = "FAILED", traceback.format_exc()
                failed += 1
            title = check.__name__.removeprefix("check_").replace("_", " ")
            say(f"{verdict:8}  {title:20}  {time.monotonic() - start:5.1f} s  {said}")
        for table in (speed_of_operators, speed_of_models):
            say("")
            try:
                for line in table(place):
                    say(line)
            except Exception:
                say(f"FAILED: {traceback.format_exc()}")
                failed += 1
        say(f"\n{failed} failed, {time.monotonic() - began:.0f} s")
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
