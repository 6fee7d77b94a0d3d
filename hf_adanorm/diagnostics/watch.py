"""Record what every norm of a model does to activations and gradients while the model trains: `watch_norms`.

1. On a recorded step each norm gets two hooks. The one before it puts an alias in place of its input, so that the
   gradient of the norm alone is seen where a residual connection reads the same tensor. The one after it computes the
   statistics of the input and waits for the gradient of the output. Nothing counts until that gradient arrives: a
   forward pass that gradient checkpointing repeats, or one without gradients, leaves no trace.
2. Statistics stay on the device as small vectors until the step ends, which is one transfer. On all other steps no
   hook is left on any module.
3. A step ends when an optimizer that holds parameters of the model steps, so accumulated micro-batches are one step.
4. Compiled graphs do not run hooks that come later: recorded steps run eagerly under `torch.compile`.

Gradients are those of the loss as it was given to `backward`: fp16 loss scaling and the division by micro-batches are
in them. `log.py` documents the statistics.
"""

from __future__ import annotations

import dataclasses
import math
import sys
import warnings
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook
from transformers import TrainerCallback

from hf_adanorm.detection import NormInfo, check_module, iter_norms
from hf_adanorm.modeling_adanorm import check_number, is_swapped
from hf_adanorm.norms import computes_n

from .log import FORWARD_FIELDS, HISTOGRAM_BINS, HISTOGRAM_RANGE, INPUT_FIELDS, OUTPUT_FIELDS, NormLog, NormRecord

if TYPE_CHECKING:
    from transformers import Trainer


@contextmanager
def watch_norms(
    model: nn.Module, every: int = 10, *, k: float = 0.1, histogram: bool = False, start_step: int = 0
) -> Iterator[NormLog]:
    """Record what every norm of `model`, stock or swapped, does at every `every`-th training step, the first included.

    A step ends when a `torch.optim` optimizer with parameters of the model steps; without one, everything in the block
    is a single step unless `log.end_step()` is called. Nothing is left on the model, also after an exception. Works
    under DDP (each process records its own rows, `log.gather()` joins them), gradient checkpointing and accumulation.
    Under `torch.compile` the recorded steps run eagerly, which one warning says. An AdaNorm keeps its normalized input
    for the backward pass of a recorded step: some memory more than usual under gradient checkpointing.

    Args:
        model: any module with norms, wrapped (DDP, `torch.compile`) or not.
        every: recorded are the steps 1, 1 + every, 1 + 2 * every, ...
        k: AdaNorm's k for the shares of norms that have none of their own; > 0.
        histogram: count the values of y = N(x) as well (`log.histograms`), for `plots.plot_phi`.
        start_step: steps done before, for a resumed run; they are counted on from there.

    Yields:
        The `NormLog`, filled as the steps end.

    Raises:
        TypeError, ValueError: an argument of the wrong type or out of range, a model without norms.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from hf_adanorm import AdaNorm, watch_norms
        >>> model = nn.Sequential(nn.Linear(8, 16), AdaNorm(16), nn.Linear(16, 1))
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> with watch_norms(model, every=2) as log:
        ...     for _ in range(3):
        ...         model(torch.randn(4, 8)).square().mean().backward()
        ...         optimizer.step()
        ...         optimizer.zero_grad()
        >>> log.steps, log.names, tuple(log.values("grad_input_var").shape)
        ([1, 3], ['1'], (2, 1))
        >>> bool((log.values("grad_input_mean") < 1e-6).all())   # the derivative of the mean re-centers
        True
    """
    watcher = _Watcher(model, every, k, histogram, start_step)
    handle = register_optimizer_step_post_hook(watcher.optimizer_stepped)
    watcher.start()
    try:
        yield watcher.log
    finally:
        handle.remove()
        watcher.stop()


class WatchNormsCallback(TrainerCallback):
    """`watch_norms` for the Trainer: records into `callback.log` and writes to the trackers (`report_to`).

        trainer.add_callback(WatchNormsCallback(trainer, every=10))

    Args:
        trainer: whose trackers get the statistics of each recorded step. They are not printed and not put into
            `state.log_history`: there are ten and more for every norm. None: `callback.log` only.
        every, k, histogram: as `watch_norms`.
    """

    def __init__(
        self, trainer: Trainer | None = None, every: int = 10, *, k: float = 0.1, histogram: bool = False
    ) -> None:
        _check(every, k, 0)
        self.trainer, self.every, self.k, self.histogram = trainer, every, k, histogram
        self.log: NormLog | None = None
        self._watcher: _Watcher | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        self.on_train_end(args, state, control)  # of a training that was broken off
        self._watcher = _Watcher(model, self.every, self.k, self.histogram, state.global_step)
        if getattr(args, "torch_compile", False):
            self._watcher.warn_of_compile()
        self.log = self._watcher.log
        self._watcher.start()

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._watcher is not None:  # the gradients are still there, whatever kind of optimizer it is
            self._watcher.end_step()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        records = self.log.records if self.log is not None else []
        if self.trainer is None or self.log is None or not records or records[-1].step != state.global_step:
            return
        from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK  # noqa: PLC0415, heavy

        trackers: tuple[Any, ...] = tuple(INTEGRATION_TO_CALLBACK.values())
        for callback in self.trainer.callback_handler.callbacks:
            if isinstance(callback, trackers):
                callback.on_log(args, state, control, model=self.trainer.model, logs=self.log.scalars())

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._watcher is not None:
            self._watcher.stop()
            self._watcher = None


# ------------------------------------------------------------------------------------------------------ the watcher


def _check(every: int, k: float, start_step: int) -> None:
    for name, value, minimum in (("every", every, 1), ("start_step", start_step, 0)):
        if isinstance(value, bool) or not isinstance(value, int):
            raise TypeError(f"{name} must be an integer, got {value!r}")
        if value < minimum:
            raise ValueError(f"{name} must be at least {minimum}, got {value}")
    check_number("k", k, inclusive=False)


_WRAPPER_PARTS = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")


def _unwrapped(model: nn.Module) -> nn.Module:
    while True:
        inner = model._modules.get("_orig_mod")
        if inner is None and type(model).__name__ in ("DistributedDataParallel", "DataParallel", "DeepSpeedEngine"):
            inner = model._modules.get("module")
        if inner is None:
            return model
        model = inner


def _clean(name: str) -> str:
    return ".".join(part for part in name.split(".") if part not in _WRAPPER_PARTS)


def _is_recomputing() -> bool:
    return torch._C._current_graph_task_id() != -1


@dataclass(eq=False)
class _Watched:
    """A norm and what this step has brought so far: pairs of a number of rows and a vector of means over them."""

    name: str
    module: Any
    info: NormInfo
    norm: str
    sums: dict[str, list[tuple[int, Tensor]]] = dataclasses.field(default_factory=dict)
    order: int = -1
    before: nn.Module | None = None
    after: nn.Module | None = None


class _Watcher:
    def __init__(self, model: nn.Module, every: int, k: float, histogram: bool, start_step: int):
        check_module(model)
        _check(every, k, start_step)
        self.model = _unwrapped(model)
        self.k, self.histogram = float(k), histogram
        self.every, self.start_step, self.step = every, start_step, start_step
        self.log = NormLog(type(self.model).__name__, every, self.k)
        self.norms: list[_Watched] = []
        self.find_norms()
        if not self.norms:
            raise ValueError(
                f"{type(self.model).__name__} has no LayerNorm, RMSNorm or swapped norm to watch; "
                "inspect_model(model) lists every norm"
            )
        self.parameters = {id(p) for p in model.parameters()}
        self.optimizer: weakref.ref[Any] | None = None
        self.handles: list[Any] = []
        self.layer_handles: list[Any] = []
        self.stance: Any = None
        self.num_ran = 0
        self.last_layer: nn.Module | None = None
        self.waiting: list[_Watched] = []
        if any(
            type(m).__name__ == "OptimizedModule" or getattr(m, "_compiled_call_impl", None) is not None
            for m in model.modules()
        ):
            self.warn_of_compile()

    def warn_of_compile(self) -> None:
        warnings.warn(
            f"the model is compiled: watch_norms runs every {self.every}th step without torch.compile, as compiled "
            "graphs do not show what happens inside",
            stacklevel=5,
        )

    def find_norms(self) -> None:
        skipped = []
        known = {watched.name: watched for watched in self.norms}
        self.norms = []
        for name, module, info in iter_norms(self.model):
            name = _clean(name)
            if info.kind == "other":
                skipped.append(name)
                continue
            swapped = is_swapped(module)
            found = _Watched(name, module, info, str(module.norm_name) if swapped else info.kind)
            if name in known:
                old = known[name]
                found.order, found.before, found.after = old.order, old.before, old.after
            self.norms.append(found)
        self.log.skipped = tuple(skipped)

    # -- steps -----------------------------------------------------------------------------------------------

    @property
    def is_recorded(self) -> bool:
        """Whether the step that comes next is."""
        return self.step % self.every == 0

    def start(self) -> None:
        self.log._end_step = self.end_step
        if self.is_recorded:
            self.install()

    def stop(self) -> None:
        if any(watched.sums for watched in self.norms):
            self.step += 1
            self.collect()
        self.remove()
        self.log._end_step = None

    def optimizer_stepped(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        bound = self.optimizer() if self.optimizer is not None else None
        if bound is None:  # one optimizer counts the steps, also where several share the parameters
            if not any(id(p) in self.parameters for group in optimizer.param_groups for p in group["params"]):
                return
            self.optimizer = weakref.ref(optimizer)
        elif bound is not optimizer:
            return
        self.end_step()

    def end_step(self) -> None:
        self.step += 1
        if self.handles:
            self.collect()
            if self.is_recorded and not self.is_stale():
                self.unfollow_layers()
                return
            self.remove()
        if self.is_recorded:
            self.install()

    def install(self) -> None:
        if self.is_stale():
            self.find_norms()
        for watched in self.norms:
            before, after = self.make_hooks(watched)
            self.handles.append(watched.module.register_forward_pre_hook(before, with_kwargs=True))
            self.handles.append(watched.module.register_forward_hook(after))
        if all(watched.order < 0 for watched in self.norms):
            self.follow_layers()
        if "torch._dynamo" in sys.modules:  # without it nothing can have been compiled
            self.stance = torch.compiler.set_stance("force_eager")

    def is_stale(self) -> bool:
        """Check whether norms were replaced since, by a patch."""
        modules = set(self.model.modules())
        return any(watched.module not in modules for watched in self.norms)

    def remove(self) -> None:
        for handle in self.handles:
            handle.remove()
        self.handles.clear()
        self.unfollow_layers()
        if self.stance is not None:
            self.stance.__exit__(None, None, None)
            self.stance = None

    # -- the layers around a norm ----------------------------------------------------------------------------

    def follow_layers(self) -> None:
        """On the first recorded step, note in which order norms and layers run."""

        def restart(*_: Any) -> None:
            if not _is_recomputing():
                self.last_layer, self.waiting = None, []

        def ran(module: nn.Module, *_: Any) -> None:
            if _is_recomputing():
                return
            self.last_layer = module
            for watched in self.waiting:
                watched.after = watched.after or module
            self.waiting = []

        norms = {id(watched.module) for watched in self.norms}
        self.layer_handles.append(self.model.register_forward_pre_hook(restart))
        for module in self.model.modules():
            has_parameters = any(p is not None and p.requires_grad for p in module._parameters.values())
            if has_parameters and id(module) not in norms:
                self.layer_handles.append(module.register_forward_pre_hook(ran))

    def unfollow_layers(self) -> None:
        for handle in self.layer_handles:
            handle.remove()
        self.layer_handles.clear()
        self.last_layer, self.waiting = None, []

    def note_order(self, watched: _Watched) -> None:
        if watched.order < 0:
            watched.order, self.num_ran = self.num_ran, self.num_ran + 1
            if not _is_recomputing():  # reentrant checkpointing: the neighbors were noted in the first pass
                watched.before = self.last_layer
                self.waiting.append(watched)

    # -- one norm --------------------------------------------------------------------------------------------

    def make_hooks(self, watched: _Watched) -> tuple[Callable[..., Any], Callable[..., Any]]:
        state: dict[str, Any] = {}

        def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            state.clear()
            if module is not watched.module:  # patched since, and the hooks came along: looked at anew after this step
                return None
            self.note_order(watched)
            x = args[0] if args else next(iter(kwargs.values()), None)
            if not (torch.is_grad_enabled() and isinstance(x, Tensor)):
                return None
            state["x"] = x.detach()
            if not x.requires_grad:
                return None
            alias = x.view_as(x)
            alias.register_hook(lambda grad: self.input_gradient(watched, grad))  # type: ignore[no-untyped-call]
            if args:
                return (alias, *args[1:]), kwargs
            return args, {**kwargs, next(iter(kwargs)): alias}

        def after(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            x = state.pop("x", None)
            if x is None or not isinstance(output, Tensor) or not output.requires_grad:
                return
            forward, sigma, factor, counts = self.input_statistics(watched, x)

            def hook(grad: Tensor) -> None:
                self.output_gradient(watched, grad, forward, sigma, factor, counts)

            output.register_hook(hook)  # type: ignore[no-untyped-call]

        return before, after

    @torch.no_grad()
    def input_statistics(self, watched: _Watched, x: Tensor) -> tuple[Tensor, Tensor | None, Any, Tensor | None]:
        """(statistics of the input, sigma per row, what dl/d(output) is multiplied by to give dl/dy, histogram)."""
        info = watched.info
        x = self.rows(info, x)
        if is_swapped(watched.module) and not computes_n(type(watched.module.inner)):
            mean, std = _mean_and_var(x)[0], _mean_and_var(x)[1].sqrt()
            nan = mean.new_full((), math.nan)
            return torch.stack([mean.mean(), std.mean(), nan, nan]), None, None, None
        if info.kind == "layernorm":
            y, mean, rstd = torch.native_layer_norm(x, x.shape[-1:], None, None, info.eps)
            mean, rstd = mean.squeeze(-1), rstd.squeeze(-1)
            std = (rstd.pow(-2) - info.eps).clamp_min(0).sqrt()
        else:
            mean, var = _mean_and_var(x)
            std = var.sqrt()
            rstd = (var + mean.square() + info.eps).rsqrt()
            y = x * rstd[..., None]
        k = getattr(watched.module, "k", self.k)
        shares = [mean.new_zeros(())] * 2
        if k:
            limit = 1 / k
            shares = [torch.count_nonzero(beyond) / y.numel() for beyond in (y >= limit, y > 0.5 * limit)]
        counts = torch.histc(y.clamp(*HISTOGRAM_RANGE), HISTOGRAM_BINS, *HISTOGRAM_RANGE) if self.histogram else None
        forward = torch.stack([mean.mean(), std.mean(), *shares])
        factor: Any = None
        if is_swapped(watched.module):
            factor = watched.module.backward_factor(y)
        elif info.gain_name is not None:
            gain = getattr(watched.module, info.gain_name).detach()
            # Where the gain is sharded or gathered only for the moment, dl/dy is not known.
            whole = type(gain) in (Tensor, nn.Parameter) and gain.numel() == y.shape[-1]
            factor = gain.flatten().float() + info.gain_offset if whole else math.nan
        return forward, 1 / rstd, factor, counts

    @torch.no_grad()
    def output_gradient(
        self,
        watched: _Watched,
        grad: Tensor,
        forward: Tensor,
        sigma: Tensor | None,
        factor: Any,
        counts: Tensor | None,
    ) -> None:
        grad = self.rows(watched.info, grad)
        mean, var = _mean_and_var(grad)
        if sigma is None:
            detached = [mean.new_full((), math.nan)] * 2
        else:
            mean_y, var_y = (mean, var) if factor is None else _mean_and_var(grad * factor)
            detached = [(mean_y.abs() / sigma).mean(), (var_y / sigma.square()).mean()]
        num_rows = mean.numel()
        self.add(watched, "forward", num_rows, forward)
        self.add(watched, "output", num_rows, torch.stack([mean.abs().mean(), var.mean(), *detached]))
        if counts is not None:
            self.add(watched, "counts", num_rows, counts)

    @torch.no_grad()
    def input_gradient(self, watched: _Watched, grad: Tensor) -> None:
        mean, var = _mean_and_var(self.rows(watched.info, grad))
        self.add(watched, "input", mean.numel(), torch.stack([mean.abs().mean(), var.mean()]))

    @staticmethod
    def add(watched: _Watched, part: str, num_rows: int, vector: Tensor) -> None:
        watched.sums.setdefault(part, []).append((num_rows, vector))

    @staticmethod
    def rows(info: NormInfo, tensor: Tensor) -> Tensor:
        """(rows, H) in at least float32."""
        if (to_local := getattr(tensor, "to_local", None)) is not None:
            tensor = to_local()  # a DTensor: tensor parallelism divides the rows
        if info.channels_first:
            tensor = tensor.movedim(1, -1)
        tensor = tensor.detach().flatten(-len(info.normalized_shape)).flatten(0, -2)
        return tensor.float() if tensor.dtype in (torch.float16, torch.bfloat16) else tensor

    # -- the end of a step -----------------------------------------------------------------------------------

    @torch.no_grad()
    def collect(self) -> None:
        """Turn what the step brought into records: one transfer from the device."""
        ran = [watched for watched in sorted(self.norms, key=lambda w: w.order) if watched.sums]
        vectors = [vector for watched in ran for part in watched.sums.values() for _, vector in part]
        around = [gradient_norm(layer) for watched in ran for layer in (watched.before, watched.after)]
        if not ran:
            return
        values = iter(_to_lists([*vectors, *around]))
        means: dict[str, dict[str, list[float]]] = {}
        for watched in ran:
            for part, entries in watched.sums.items():
                lists = [next(values) for _ in entries]
                weights = [1 if part == "counts" else rows for rows, _ in entries]
                total = 1 if part == "counts" else sum(weights)
                columns = zip(*lists, strict=True)
                means.setdefault(watched.name, {})[part] = [
                    sum(w * v for w, v in zip(weights, column, strict=True)) / total for column in columns
                ]
        for watched in ran:
            found = means[watched.name]
            statistics = dict(zip(FORWARD_FIELDS, found["forward"], strict=True))
            statistics |= zip(OUTPUT_FIELDS, found["output"], strict=True)
            statistics |= zip(INPUT_FIELDS, found.get("input", (math.nan, math.nan)), strict=True)
            statistics |= {"grad_norm_before": next(values)[0], "grad_norm_after": next(values)[0]}
            num_rows = sum(rows for rows, _ in watched.sums["output"])
            self.log.records.append(
                NormRecord(step=self.step, name=watched.name, norm=watched.norm, num_rows=num_rows, **statistics)
            )
            if "counts" in found:
                counts = torch.tensor(found["counts"], dtype=torch.float64)
                self.log.histograms[watched.name] = self.log.histograms.get(watched.name, 0) + counts
            watched.sums = {}


def _mean_and_var(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and biased variance of each row of (rows, H). `torch.var_mean` is ten times slower on a CPU."""
    mean = rows.mean(-1)
    square = torch.linalg.vector_norm(rows, dim=-1).square() / rows.shape[-1]
    return mean, (square - mean.square()).clamp_min(0)


def gradient_norm(layer: nn.Module | None) -> Tensor:
    """The norm of the gradients of a layer's own parameters, a vector of one; NaN without or with sharded ones."""
    grads = [] if layer is None else [p.grad for p in layer._parameters.values() if p is not None]
    found = [grad for grad in grads if type(grad) is Tensor and not grad.is_sparse]
    if not found:
        return torch.full((1,), math.nan)
    norms: Tensor = torch.stack([torch.linalg.vector_norm(grad.float()) for grad in found])
    return norms.square().sum().sqrt()[None]


def _to_lists(vectors: list[Tensor]) -> list[list[float]]:
    """The vectors' values, with one transfer for each device they are on."""
    by_device: dict[torch.device, list[int]] = {}
    for i, vector in enumerate(vectors):
        by_device.setdefault(vector.device, []).append(i)
    out: list[list[float]] = [[] for _ in vectors]
    for indices in by_device.values():
        parts = [vectors[i].flatten() for i in indices]
        on_cpu = torch.split(torch.cat(parts).cpu(), [len(part) for part in parts])
        for i, part in zip(indices, on_cpu, strict=True):
            out[i] = part.tolist()
    return out
