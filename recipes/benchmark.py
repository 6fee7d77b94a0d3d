"""Measure what the norms cost, relative to the model's own norms, with intervals.

    python recipes/benchmark.py                                  # the norms alone, on a CPU or GPU
    python recipes/benchmark.py --what norms models --modes eager compiled
    python recipes/benchmark.py --norms adanorm my_norms.py:Derf:alpha=0.7 --shapes 512x768
    python recipes/benchmark.py --quick --what norms models      # whether it runs here, in seconds

Each variant and its baseline take turns, in alternating order, and each turn yields one ratio of their times. So a
busy machine slows down both. The table gives the median ratio and its 95 % interval (from order statistics). A goal is
met if the interval ends at most 0.02 above it, and missed if it begins above that; otherwise there is no verdict. With
one thread the clock is CPU time, else wall time; on a GPU each turn ends with a synchronization. On Linux freed memory
stays with the process: whether a call pays for fresh pages would otherwise depend on what was freed before it.

Baselines are nn.LayerNorm (nn.RMSNorm after --rmsnorm) and the unpatched model. Inference runs under torch.no_grad.
"""

from __future__ import annotations

import argparse
import csv
import ctypes
import io
import math
import statistics
import sys
import time
import timeit
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

MARGIN = 0.02
SHAPES = ("64x256", "512x64", "512x256", "512x768", "512x1024", "4096x128", "4096x768", "32x4096")
MODELS = ("bert", "gpt2", "llama")
TASKS = ("inference", "generation", "training")
# "seconds": median of one call. "saved": bytes kept for the backward pass, relative to the baseline.
COLUMNS = ("case", "dtype", "mode", "task", "norm", "seconds", "ratio", "low", "high", "verdict", "saved")

Calls = dict[str, Callable[[], Any]]  # what is timed, by task
Case = tuple[str, str, Calls, Calls, float | None]  # case, norm, its calls, those of the baseline, saved


# ------------------------------------------------------------------------------------------------------- measuring


def interval(ratios: Sequence[float]) -> tuple[float, float, float]:
    """Return the median and the ends of its 95 % interval, from order statistics (Conover, 1999)."""
    ordered, n = sorted(ratios), len(ratios)
    below = max(0, math.floor(n / 2 - 1.96 * math.sqrt(n) / 2))
    return statistics.median(ordered), ordered[below], ordered[n - 1 - below]


def verdict(low: float, high: float, goal: float) -> str:
    """Return "met", "missed", or "" where the interval straddles the goal."""
    if high <= goal + MARGIN:
        return "met"
    return "missed" if low > goal + MARGIN else ""


def take_turns(
    variant: Callable[[], Any],
    baseline: Callable[[], Any],
    *,
    rounds: int,
    seconds: float,
    clock: Callable[[], float] = time.process_time,
) -> tuple[float, list[float]]:
    """Return the median seconds of a call of `variant`, and its ratio to `baseline` in each round.

    Args:
        seconds: how long a turn of each takes, at least one call.
        clock: returns seconds.
    """
    timers = [timeit.Timer(call, timer=clock) for call in (variant, baseline)]
    once = [min(timer.repeat(2, number=1)) for timer in timers]  # the first call warms up
    runs = [max(1, min(10_000, math.ceil(seconds / max(value, 1e-7)))) for value in once]
    times: list[list[float]] = []
    for turn in range(rounds):
        times.append([0.0, 0.0])
        for index in (0, 1) if turn % 2 else (1, 0):
            times[-1][index] = timers[index].timeit(runs[index]) / runs[index]
    return statistics.median(one for one, _ in times), [one / max(other, 1e-12) for one, other in times]


def keep_freed_memory() -> None:
    """Let glibc return no memory to the system: no mmap for large blocks (M_MMAP_MAX), no trimming of the heap."""
    libc = ctypes.CDLL(None) if sys.platform == "linux" else None
    if mallopt := getattr(libc, "mallopt", None):
        mallopt(-4, 0)
        mallopt(-1, 2**31 - 1)


def clock_of(options: argparse.Namespace) -> Callable[[], float]:
    """Return CPU time for one thread on the CPU, else wall time, taken when the device has finished its work."""
    import torch

    if options.device == "cpu":
        return time.process_time if options.threads == 1 else time.perf_counter

    def clock() -> float:
        torch.accelerator.synchronize()
        return time.perf_counter()

    return clock


def saved_bytes(module: nn.Module, x: Tensor) -> int:
    """Return the bytes that a forward pass keeps for the backward pass, without parameters; count storage once."""
    from torch.autograd.graph import saved_tensors_hooks

    own = {parameter.untyped_storage().data_ptr() for parameter in module.parameters()}
    saved: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        module(x)
    return sum(saved.values())


# ----------------------------------------------------------------------------------------------------------- norms


def norm_calls(module: nn.Module, x: Tensor, dz: Tensor, mode: str) -> Calls:
    """Return what is timed of one norm."""
    import torch

    function = torch.compile(module) if mode == "compiled" else module
    inputs = [x, *module.parameters()]

    def infer() -> None:
        with torch.no_grad():
            function(x)

    return {"inference": infer, "training": lambda: torch.autograd.grad(function(x), inputs, dz)}


def build_norm(norm: str, width: int, dtype: torch.dtype, *, centered: bool) -> nn.Module:
    """Return a norm as `patch_model` would put it in the place of a LayerNorm or RMSNorm."""
    from torch import nn

    from hf_adanorm import patch_model

    stock = nn.LayerNorm(width, dtype=dtype) if centered else nn.RMSNorm(width, 1e-5, dtype=dtype)
    return patch_model(nn.Sequential(stock), norm, targets="all")[0] if norm != "layernorm" else stock


def norm_cases(options: argparse.Namespace, mode: str, dtype: torch.dtype) -> Iterator[Case]:
    """Yield each shape with each norm, its calls and those of the stock norm."""
    import torch

    for shape in options.shapes:
        rows, width = map(int, shape.split("x"))
        x, dz = torch.randn(2, rows, width, device=options.device, dtype=dtype).unbind()
        x = x.clone().requires_grad_()
        stock = build_norm("layernorm", width, dtype, centered=not options.rmsnorm).to(options.device)
        base = norm_calls(stock, x, dz, mode)
        for norm in options.norms:
            module = build_norm(norm, width, dtype, centered=not options.rmsnorm).to(options.device)
            saved = saved_bytes(module, x) / saved_bytes(stock, x)
            yield shape, norm, norm_calls(module, x, dz, mode), base, saved


# ---------------------------------------------------------------------------------------------------------- models


def build_model(kind: str, *, width: int, layers: int, vocabulary: int = 1024) -> nn.Module:
    """Return a model of `kind` (one of MODELS) with random weights and without dropout."""
    import transformers as tf

    heads = max(1, width // 64)
    sizes: dict[str, Any] = {"hidden_size": width, "num_hidden_layers": layers, "num_attention_heads": heads}
    sizes |= {"vocab_size": vocabulary, "intermediate_size": 4 * width}
    if kind == "bert":
        return tf.BertForMaskedLM(tf.BertConfig(hidden_dropout_prob=0, attention_probs_dropout_prob=0, **sizes))
    if kind == "llama":
        return tf.LlamaForCausalLM(tf.LlamaConfig(**sizes))
    none = {"resid_pdrop": 0, "embd_pdrop": 0, "attn_pdrop": 0, "bos_token_id": 1, "eos_token_id": None}
    return tf.GPT2LMHeadModel(tf.GPT2Config(vocab_size=vocabulary, n_embd=width, n_layer=layers, n_head=heads, **none))


def model_calls(model: Any, tokens: Tensor, mode: str, new_tokens: int) -> Calls:
    """Return what is timed of one model. Generation reads one prompt and appends to a cache."""
    import torch

    function = torch.compile(model) if mode == "compiled" else model
    inputs: dict[str, Any] = {"input_ids": tokens}
    if model.can_generate():
        inputs["use_cache"] = False  # filling a cache would recompile for every layer
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    length = {"max_new_tokens": new_tokens, "min_new_tokens": new_tokens, "do_sample": False, "pad_token_id": 0}

    def infer() -> None:
        model.eval()
        with torch.no_grad():
            function(**inputs)

    def train() -> None:
        model.train()
        function(**inputs, labels=tokens).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    calls: Calls = {"inference": infer, "training": train}
    if mode == "eager" and model.can_generate():
        calls["generation"] = lambda: model.eval().generate(tokens[:1, :8], **length)
    return calls


def model_cases(options: argparse.Namespace, mode: str, dtype: torch.dtype) -> Iterator[Case]:
    """Yield each model with each norm, its calls and those of the unpatched model."""
    import copy

    import torch

    from hf_adanorm import patch_model

    for kind in options.models:
        torch.manual_seed(0)
        stock = build_model(kind, width=options.width, layers=options.layers).to(options.device, dtype)
        tokens = torch.randint(2, 1024, (options.batch, options.length), device=options.device)
        base = model_calls(stock, tokens, mode, options.new_tokens)
        base = {task: call for task, call in base.items() if task in options.tasks}
        for norm in options.norms:
            model = patch_model(copy.deepcopy(stock), norm)
            yield kind, norm, model_calls(model, tokens, mode, options.new_tokens), base, None


# ---------------------------------------------------------------------------------------------------------- report


def measure(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Yield one row of the table after the other."""
    import torch

    clock = clock_of(options)
    for what, mode, name in ((w, m, d) for w in options.what for m in options.modes for d in options.dtypes):
        cases = {"norms": norm_cases, "models": model_cases}[what]
        for case, norm, calls, base, saved in cases(options, mode, getattr(torch, name)):
            torch.compiler.reset()  # a function is recompiled a limited number of times
            for task in (task for task in TASKS if task in base):
                seconds, ratios = take_turns(
                    calls[task], base[task], rounds=options.rounds, seconds=options.seconds, clock=clock
                )
                ratio, low, high = interval(ratios)
                said = "" if options.quick else verdict(low, high, options.goal)
                values = (case, name, mode, task, norm, seconds, ratio, low, high, said, saved)
                yield dict(zip(COLUMNS, values, strict=True))


def line(row: dict[str, Any]) -> str:
    """Return a row as a line of the printed table."""
    saved = "" if row["saved"] is None else f"  saves {row['saved']:.2f}"
    return (
        "{case:10} {dtype:8} {mode:8} {task:10} {norm:22} ".format(**row)
        + f"{row['seconds'] * 1e6:11,.1f} us  "
        + "{ratio:.3f} [{low:.3f}, {high:.3f}] {verdict:6}".format(**row)
        + saved
    )


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Return the options; --quick overrides sizes and rounds."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--what", nargs="+", choices=("norms", "models"), default=["norms"])
    add("--norms", nargs="+", default=["adanorm"], help="as patch_model takes them, or FILE.py:CLASS:SETTING=VALUE")
    add("--modes", nargs="+", choices=("eager", "compiled"), default=["eager"])
    add("--shapes", nargs="+", default=list(SHAPES), help="rows x width, such as 512x768")
    add("--rmsnorm", action="store_true", help="uncentered norms against nn.RMSNorm")
    add("--models", nargs="+", choices=MODELS, default=list(MODELS))
    add("--tasks", nargs="+", choices=TASKS, default=list(TASKS), help="of models")
    add("--width", type=int, default=256, help="of models")
    add("--layers", type=int, default=4, help="of models")
    add("--batch", type=int, default=4, help="sequences of a model's batch")
    add("--length", type=int, default=128, help="tokens of a sequence")
    add("--new_tokens", type=int, default=16, help="that generation appends")
    add("--dtypes", nargs="+", choices=("float32", "bfloat16", "float16"), default=["float32"])
    add("--device", default=None, help='such as "cpu" or "cuda:0"; a GPU if there is one')
    add("--threads", type=int, default=1, help="of torch on the CPU")
    add("--rounds", type=int, default=25, help="turns of each pair; a 95 %% interval needs at least 6")
    add("--seconds", type=float, default=0.004, help="that one turn takes at least")
    add("--goal", type=float, default=1.0, help="the ratio to reach")
    add("--output", type=Path, help="a CSV file for the rows")
    add("--quick", action="store_true", help="tiny sizes and few rounds: whether it runs, not what it costs")
    options = parser.parse_args(arguments)
    for name, least in (("rounds", 6), ("threads", 1), ("width", 64), ("layers", 1), ("batch", 1), ("length", 8)):
        if getattr(options, name) < least:
            parser.error(f"--{name} must be >= {least}, got {getattr(options, name)}")
    for shape in options.shapes:
        if not (len(parts := shape.split("x")) == 2 and all(part.isdigit() and int(part) for part in parts)):
            parser.error(f"--shapes must be rows x width, such as 512x768, got {shape!r}")
    if options.quick:
        tiny = {"shapes": ["32x64"], "width": 64, "layers": 1, "length": 16, "new_tokens": 2}
        vars(options).update(tiny, rounds=6, seconds=0.0)
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print each row as it is known, and write the CSV file. Return 2 for an argument that is refused."""
    options = parse(arguments)
    import torch

    from hf_adanorm.saving import write_file

    keep_freed_memory()
    options.device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    torch.set_num_threads(options.threads)
    warnings.simplefilter("ignore")  # about gains and biases that are dropped
    rows = []
    try:
        torch.empty(0, device=options.device)
        print(f"{options.device}, torch {torch.__version__}, {options.threads} thread(s), goal {options.goal:g}")
        for row in measure(options):
            rows.append(row)
            print(line(row), flush=True)
    except (ValueError, TypeError, FileNotFoundError, RuntimeError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if options.output is not None:
        text = io.StringIO(newline="")
        writer = csv.DictWriter(text, COLUMNS)
        writer.writeheader()
        writer.writerows(rows)
        write_file(options.output, text.getvalue())
    return 0


if __name__ == "__main__":
    sys.exit(main())
