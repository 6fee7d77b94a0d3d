"""What the norms cost, measured: `hf-adanorm bench`.

Three levels: the operator alone (widths x rows x dtypes), whole models (training step and inference of BERT-, GPT-2-,
Marian- and ViT-like models), and what patching, saving and loading take. All contenders of a case live in one process
and take turns, in another order every round, so that whatever else the machine does meets them alike. Every time is
a median over the rounds; every ratio is the median of the ratios to `nn.LayerNorm` within a round, given with its
quartiles. The clock is that of CUDA events on a GPU, CPU time with one thread, and wall time with several.
"""

from __future__ import annotations

import contextlib
import functools
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers as tf
from torch import Tensor, nn

from hf_adanorm import modeling_adanorm
from hf_adanorm.patching import patch_model

from . import report as files
from .contenders import BASELINE, MODELS, OWN, SIZES, Size, build_model, contenders, count_norms, with_norm
from .timing import Measurement, seconds_of, summarize, take_turns

LEVELS = ("op", "model", "patch")
MODES = ("eager", "compiled")


@contextlib.contextmanager
def _without_loops() -> Iterator[None]:
    kept, modeling_adanorm.cpu_kernel = modeling_adanorm.cpu_kernel, None
    try:
        yield
    finally:
        modeling_adanorm.cpu_kernel = kept


def _on_torch(function: Callable[[], Any]) -> Callable[[], Any]:
    def call() -> Any:
        with _without_loops():
            return function()

    return call


# ------------------------------------------------------------------------------------------------------ operator


def saved_bytes(module: nn.Module, x: Tensor) -> int:
    """Bytes that a forward pass keeps for the backward pass, parameters aside; shared storage counts once."""
    own = {parameter.untyped_storage().data_ptr() for parameter in module.parameters()}
    saved: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        module(x)
    return sum(saved.values())


def bench_operator(
    *,
    device: torch.device,
    widths: Sequence[int],
    row_counts: Sequence[int],
    dtypes: Sequence[torch.dtype],
    modes: Sequence[str] = MODES,
    norms: Sequence[str] | None = None,
    rounds: int = 30,
    min_seconds: float = 2e-3,
    report: Callable[[str], None] = lambda text: None,
) -> list[Measurement]:
    """Forward, and forward + backward, of every contender (or of `norms`, the baseline among them) for every width,
    number of rows and dtype."""
    results = []
    cases = [(mode, dtype, width) for mode in modes for dtype in dtypes for width in widths]
    for mode, dtype, width in cases:
        modules = {name: module.to(device).train() for name, module in contenders(width, dtype).items()}
        if mode == "compiled" or device.type != "cpu":
            del modules["adanorm-torch"]  # there, it is AdaNorm
        if norms is not None:
            modules = {name: module for name, module in modules.items() if name in norms}
        functions: dict[str, Callable[[Tensor], Tensor]] = dict(modules)
        if mode == "compiled":
            torch._dynamo.reset()
            functions = {name: torch.compile(module) for name, module in modules.items()}
        for rows in row_counts:
            report(f"operator: {mode}, {_name(dtype)}, {rows}x{width}")
            x = torch.randn(rows, width, device=device).to(dtype).requires_grad_()
            dz = torch.randn(rows, width, device=device).to(dtype)
            if mode == "compiled":
                torch._dynamo.mark_dynamic(x, 0)  # compiled once for all numbers of rows
            tasks: dict[str, dict[str, Callable[[], Any]]] = {"forward": {}, "forward+backward": {}}
            for name, function in functions.items():
                forward, both = _forward(function, x), _forward_backward(function, modules[name], x, dz)
                if name == "adanorm-torch":
                    forward, both = _on_torch(forward), _on_torch(both)
                tasks["forward"][name], tasks["forward+backward"][name] = forward, both
            saved: dict[str, int] = {}
            if mode == "eager":
                for name, module in modules.items():
                    with _without_loops() if name == "adanorm-torch" else contextlib.nullcontext():
                        saved[name] = saved_bytes(module, x)
            for task, calls in tasks.items():
                for name, stats in summarize(take_turns(calls, device, rounds, min_seconds)).items():
                    results.append(
                        Measurement(
                            level="op",
                            case=f"{rows}x{width}",
                            dtype=_name(dtype),
                            mode=mode,
                            task=task,
                            norm=name,
                            bytes=saved.get(name),
                            parameters=sum(p.numel() for p in modules[name].parameters()),
                            **stats,
                        )
                    )
    return results


def _forward(function: Callable[[Tensor], Tensor], x: Tensor) -> Callable[[], Any]:
    return lambda: function(x)


def _forward_backward(
    function: Callable[[Tensor], Tensor], module: nn.Module, x: Tensor, dz: Tensor
) -> Callable[[], Any]:
    leaves = [x, *module.parameters()]

    def call() -> None:
        for leaf in leaves:
            leaf.grad = None
        function(x).backward(dz)  # type: ignore[no-untyped-call]

    return call


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


# --------------------------------------------------------------------------------------------------------- models


def bench_models(
    *,
    device: torch.device,
    size: Size,
    models: Sequence[str] = MODELS,
    modes: Sequence[str] = MODES,
    norms: Mapping[str, Sequence[str]],
    dtype: torch.dtype = torch.float32,
    rounds: int = 10,
    report: Callable[[str], None] = lambda text: None,
) -> list[Measurement]:
    """A training step (forward, backward, AdamW) and inference of whole models, under each of `norms[mode]`.

    Each norm is timed side by side with nn.LayerNorm alone, so that no more than two models are in memory.
    """
    results = []
    for mode in modes:
        for kind in models:
            torch.manual_seed(0)
            stock, batch, num_tokens = build_model(kind, size)
            state = {key: value.clone() for key, value in stock.state_dict().items()}
            batch = {key: value.to(device) for key, value in batch.items()}
            baseline = _Run(stock, batch, device, dtype, mode)
            for norm in norms[mode]:
                report(f"model: {mode}, {kind}, {norm}")
                if norm == BASELINE:
                    run = baseline
                else:
                    model, _, _ = build_model(kind, size)
                    model.load_state_dict(state)
                    run = _Run(with_norm(model, norm), batch, device, dtype, mode)
                for task in ("training step", "inference"):
                    times = take_turns({BASELINE: baseline.task(task), norm: run.task(task)}, device, rounds)
                    stats = summarize(times)[norm]
                    results.append(
                        Measurement(
                            level="model",
                            case=kind,
                            dtype=_name(dtype),
                            mode=mode,
                            task=task,
                            norm=norm,
                            tokens_per_second=num_tokens / stats["seconds"],
                            bytes=peak_bytes(run.task(task), device),
                            parameters=sum(p.numel() for p in run.model.parameters()),
                            modules=count_norms(run.model),
                            **stats,
                        )
                    )
                del run
            del baseline
    return results


class _Run:
    """A model with its optimizer and batch, ready to step."""

    def __init__(
        self, model: nn.Module, batch: dict[str, Tensor], device: torch.device, dtype: torch.dtype, mode: str
    ) -> None:
        self.model = model.to(device)
        self.batch = batch
        self.autocast = torch.autocast(device.type, dtype=dtype, enabled=dtype != torch.float32)
        self.optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
        self.call: Callable[..., Any] = torch.compile(model) if mode == "compiled" else model

    def task(self, name: str) -> Callable[[], Any]:
        return self.train_step if name == "training step" else self.infer

    def train_step(self) -> None:
        self.model.train()
        with self.autocast:
            loss = self.call(**self.batch).loss
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()

    def infer(self) -> None:
        self.model.eval()
        with torch.inference_mode(), self.autocast:
            self.call(**self.batch)


def peak_bytes(function: Callable[[], Any], device: torch.device) -> int:
    """The most memory that one call holds at a time beyond what was there before it."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        function()
        torch.cuda.synchronize(device)
        return int(torch.cuda.max_memory_allocated(device) - before)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        function()
    held = peak = 0
    profiler: Any = profile.profiler
    events = [event for event in profiler.kineto_results.events() if event.name() == "[memory]"]
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return int(peak)


# --------------------------------------------------------------------------------------- patching, saving, loading


def bench_patching(
    *,
    layer_counts: Sequence[int] = (8, 16, 32, 64),
    full_size: bool = True,
    rounds: int = 5,
    report: Callable[[str], None] = lambda text: None,
) -> list[Measurement]:
    """Seconds of `patch_model` as the number of modules grows, and of save_pretrained and from_pretrained of a patched
    checkpoint against the stock one (110 M parameters when `full_size`)."""
    results, row = [], functools.partial(Measurement, level="patch", dtype="float32", mode="eager")
    sizes: dict[str, Any] = {"hidden_size": 32, "num_attention_heads": 2, "intermediate_size": 64, "vocab_size": 64}
    per_norm: dict[str, list[float]] = {}
    for layers in layer_counts:
        report(f"patching: {layers} layers")
        with torch.device("meta"):
            models = [tf.BertModel(tf.BertConfig(num_hidden_layers=layers, **sizes)) for _ in range(rounds + 1)]
        modules = count_norms(models[0])
        patch_model(models.pop(), "adanorm")  # what happens once a process
        times = [seconds_of(functools.partial(patch_model, m, "adanorm"), torch.device("cpu"), 1) for m in models]
        per_norm[str(layers)] = [seconds / modules for seconds in times]
        stats = summarize(per_norm, baseline=str(layer_counts[0]))[str(layers)]
        stats["seconds"] = statistics.median(times)
        case = f"bert {layers} layers"
        results.append(row(case=case, task="patch_model, per module", norm="adanorm", modules=modules, **stats))

    config = tf.BertConfig() if full_size else tf.BertConfig(num_hidden_layers=2, **sizes)
    stock, patched = tf.BertModel(config), patch_model(tf.BertModel(config), "adanorm")
    models_by_norm = {BASELINE: stock, "adanorm": patched}
    with tempfile.TemporaryDirectory() as folder:
        report("saving and loading")
        paths = {name: str(Path(folder, name)) for name in models_by_norm}
        save = {name: functools.partial(model.save_pretrained, paths[name]) for name, model in models_by_norm.items()}
        load = {name: functools.partial(tf.BertModel.from_pretrained, paths[name]) for name in models_by_norm}
        for task, calls in (("save_pretrained", save), ("from_pretrained", load)):
            for name, stats in summarize(take_turns(calls, torch.device("cpu"), rounds, wall=True)).items():
                model = models_by_norm[name]
                count = sum(p.numel() for p in model.parameters())
                modules = count_norms(model)
                results.append(row(case="bert", task=task, norm=name, parameters=count, modules=modules, **stats))
    return results


# ----------------------------------------------------------------------------------------------------------- all


def run_bench(
    output_dir: str | Path,
    *,
    levels: Sequence[str] = LEVELS,
    modes: Sequence[str] = MODES,
    device: str | None = None,
    threads: int | None = None,
    quick: bool = False,
    report: Callable[[str], None] = lambda text: None,
) -> list[Measurement]:
    """Measure, and write `bench.csv`, `bench.txt` (the table) and `bench.png` into `output_dir` after every level.

    Args:
        levels: of LEVELS, in this order.
        modes: of MODES; "compiled" needs what torch.compile needs.
        device: such as "cpu" or "cuda:0"; None takes a GPU when there is one.
        threads: of torch on the CPU; None leaves them as they are.
        quick: the smallest sizes and few rounds, in about a minute: whether it runs, not what it costs.
        report: is told what is being measured, after how many seconds.

    Returns:
        Every measurement, in the order of the CSV.

    Raises:
        ValueError: an unknown level, mode or device, or threads < 1.
        ImportError: rich or matplotlib is missing.
    """
    for name, values, known in (("levels", levels, LEVELS), ("modes", modes, MODES)):
        if unknown := [value for value in values if value not in known]:
            raise ValueError(f"{name} must be of {', '.join(known)}, got {unknown[0]!r}")
        if not values:
            raise ValueError(f"{name} is empty: name at least one of {', '.join(known)}")
    if threads is not None and threads < 1:
        raise ValueError(f"threads must be >= 1, got {threads}")
    where = _check_device(device)
    files.check_installed()
    before, begin = torch.get_num_threads(), time.monotonic()
    results: list[Measurement] = []

    def told(text: str) -> None:
        report(f"{time.monotonic() - begin:4.0f} s  {text}")

    try:
        if threads is not None:
            torch.set_num_threads(threads)
        for level in [level for level in LEVELS if level in levels]:
            results += _run_level(level, modes, where, quick, told)
            files.write(results, Path(output_dir), where)
    finally:
        torch.set_num_threads(before)
    return results


def _run_level(
    level: str, modes: Sequence[str], device: torch.device, quick: bool, report: Callable[[str], None]
) -> list[Measurement]:
    if level == "op":
        shapes: dict[str, Any] = (
            {"widths": (64,), "row_counts": (32,), "rounds": 5, "min_seconds": 0.0}
            if quick
            else {"widths": (256, 512, 768, 1024), "row_counts": (512, 4096)}
        )
        dtypes = (torch.float32,) if quick else (torch.float32, torch.bfloat16)
        return bench_operator(device=device, dtypes=dtypes, modes=modes, report=report, **shapes)
    if level == "model":
        own = [BASELINE, *OWN]
        others = ["adanorm-lancopku", "adanorm-written", "rmsnorm"]
        size = SIZES["tiny" if quick else "base" if device.type == "cuda" else "small"]
        # Compiling a whole model takes minutes on a small machine: there, only the norms of this package.
        return bench_models(
            device=device,
            size=size,
            models=("bert",) if quick else MODELS,
            modes=modes,
            norms={
                "eager": own + others,
                "compiled": [BASELINE, "adanorm"] if quick else own if device.type == "cpu" else own + others,
            },
            dtype=torch.bfloat16 if device.type == "cuda" else torch.float32,
            rounds=3 if quick else 12,
            report=report,
        )
    if quick:
        return bench_patching(layer_counts=(2, 4), full_size=False, rounds=2, report=report)
    return bench_patching(report=report)


def _check_device(device: str | None) -> torch.device:
    if device is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        where = torch.device(device)
    except RuntimeError as error:
        raise ValueError(f"device must be such as 'cpu' or 'cuda:0', got {device!r}") from error
    if where.type not in ("cpu", "cuda"):
        raise ValueError(f"device must be a CPU or a CUDA GPU, got {device!r}")
    if where.type == "cuda" and (where.index or 0) >= torch.cuda.device_count():
        raise ValueError(f"device {device!r} is not here: torch sees {torch.cuda.device_count()} CUDA devices")
    return where
