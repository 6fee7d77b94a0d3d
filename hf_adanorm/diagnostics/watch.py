"""Record what every norm of a model does to activations and gradients while the model trains: `watch_norms`.

1. On a recorded step each norm gets two hooks. The first replaces its input by an alias, so that the gradient of the
   norm alone is seen where a residual connection reads the same tensor. The second computes the statistics of the
   input and waits for the gradient of the output. Nothing counts until that gradient arrives, so passes without
   gradients and those that gradient checkpointing repeats leave no trace.
2. Statistics stay on the device until the step ends, which is one transfer. On other steps no module has a hook.
3. A step ends when an optimizer with parameters of the model steps, so accumulated micro-batches are one step.
4. Compiled graphs do not run hooks that come later, so recorded steps run eagerly under `torch.compile`.

Gradients are those of the loss that `backward` gets: they contain fp16 loss scaling and the division by micro-batches.
`log.py` documents the statistics.
"""

from __future__ import annotations

import functools
import itertools
import math
import sys
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook
from transformers import TrainerCallback

from hf_adanorm.detection import NormInfo, check_module, iter_norms
from hf_adanorm.modeling_adanorm import check_number, is_swapped
from hf_adanorm.norms import computes_n

from .log import FIELDS, HISTOGRAM_BINS, HISTOGRAM_RANGE, NormLog, NormRecord

if TYPE_CHECKING:
    from transformers import Trainer


@contextmanager
def watch_norms(
    model: nn.Module, every: int = 10, *, k: float = 0.1, histogram: bool = False, start_step: int = 0
) -> Iterator[NormLog]:
    """Record what every norm of `model`, stock or swapped, does at every `every`-th training step, the first included.

    A step ends when a `torch.optim` optimizer with parameters of the model steps. Without one, the block is a single
    step unless you call `log.end_step()`. Afterwards the model has no hooks, also after an exception. Gradient
    checkpointing and accumulation work. Under DDP each process records its own rows, and `log.gather()` joins them.
    Under `torch.compile` the recorded steps run eagerly.

    Args:
        model: any module with norms.
        every: the steps 1, 1 + every, 1 + 2 * every, ... are recorded.
        k: AdaNorm's k for the shares of norms that have no k of their own; > 0.
        histogram: also count the values of y = N(x) (`log.histograms`), for `plots.plot_phi`.
        start_step: number of steps done before, for a resumed run.

    Yields:
        The `NormLog`, which grows as steps end.

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
        >>> bool((log.values("grad_input_mean") < 1e-6).all())  # the derivative of the mean re-centers
        True
    """
    watcher = _Watcher(model, every, k, histogram, start_step)
    handle = register_optimizer_step_post_hook(watcher.optimizer_stepped)
    watcher.install()
    try:
        yield watcher.log
    finally:
        handle.remove()
        watcher.stop()


class WatchNormsCallback(TrainerCallback):
    """Run `watch_norms` in a Trainer. It records into `callback.log`, and writes to the trackers of `report_to`::

        trainer.add_callback(WatchNormsCallback(trainer, every=10))

    Args:
        trainer: the Trainer whose trackers get the statistics of each recorded step. They are neither printed nor put
            into `state.log_history`. None: `callback.log` only.
        every, k, histogram: as in `watch_norms`.
    """

    log: NormLog | None
    """The log of the last training; None before the first."""

    def __init__(self, trainer: Trainer | None = None, every: int = 10, *, k: float = 0.1, histogram: bool = False):
        self.trainer, self.every, self.k, self.histogram = trainer, every, k, histogram
        self.log = None
        self._watcher: _Watcher | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        self.on_train_end(args, state, control)  # of an interrupted training
        self._watcher = _Watcher(model, self.every, self.k, self.histogram, state.global_step)
        self.log = self._watcher.log
        self._watcher.install()

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._watcher is not None:  # the gradients are still there, whatever kind of optimizer it is
            self._watcher.end_step()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.trainer is None or self.log is None or state.global_step not in self.log.steps[-1:]:
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


# ------------------------------------------------------------------------------------------------------- the watcher


# What training wraps a model in. Their parts are left out of the names of norms.
_WRAPPERS = ("OptimizedModule", "DistributedDataParallel", "DataParallel", "DeepSpeedEngine")
_WRAPPER_PARTS = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")


@dataclass(eq=False)
class _Watched:
    """A norm and the statistics of this step."""

    name: str
    module: Any
    info: NormInfo
    norm: str
    sums: dict[str, tuple[int, Tensor]] = field(default_factory=dict)
    """For each part: a number of rows, and a vector of sums over these rows."""

    def add(self, part: str, num_rows: int, means: Tensor) -> None:
        before, sums = self.sums.get(part, (0, torch.zeros_like(means)))
        self.sums[part] = before + num_rows, sums + num_rows * means


class _Watcher:
    def __init__(self, model: nn.Module, every: int, k: float, histogram: bool, start_step: int):
        check_module(model)
        check_number("k", k, inclusive=False)
        for name, value, minimum in (("every", every, 1), ("start_step", start_step, 0)):
            if isinstance(value, bool) or not isinstance(value, int):
                raise TypeError(f"{name} must be an integer, got {value!r}")
            if value < minimum:
                raise ValueError(f"{name} must be at least {minimum}, got {value}")
        self.parameters = {id(p) for p in model.parameters()}
        while type(model).__name__ in _WRAPPERS:
            model = next(model.children())
        self.model = model
        self.every, self.k, self.histogram, self.step = every, float(k), histogram, start_step
        self.log = NormLog(type(model).__name__, every, self.k)
        self.log._end_step = self.end_step
        self.order: dict[str, int] = {}
        self.optimizer: weakref.ref[Any] | None = None
        self.handles: list[Any] = []
        self.stance: Any = None
        self.find_norms()
        if not self.norms:
            raise ValueError(f"{type(model).__name__} has no LayerNorm, RMSNorm or swapped norm: see inspect_model")

    def find_norms(self) -> None:
        self.norms: list[_Watched] = []
        skipped = []
        for path, module, info in iter_norms(self.model):
            name = ".".join(part for part in path.split(".") if part not in _WRAPPER_PARTS)
            if info.kind == "other":
                skipped.append(name)
            else:
                kind = str(module.norm_name) if is_swapped(module) else info.kind
                self.norms.append(_Watched(name, module, info, kind))
        self.log.skipped = tuple(skipped)

    # -- steps -------------------------------------------------------------------------------------------------

    def stop(self) -> None:
        if any(watched.sums for watched in self.norms):
            self.step += 1
            self.collect()
        self.remove()
        self.log._end_step = None

    def optimizer_stepped(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        bound = self.optimizer() if self.optimizer is not None else None
        if bound is None:  # only one optimizer counts the steps, also where several share the parameters
            if not any(id(p) in self.parameters for group in optimizer.param_groups for p in group["params"]):
                return
            self.optimizer = weakref.ref(optimizer)
        elif bound is not optimizer:
            return
        self.end_step()

    def end_step(self) -> None:
        self.step += 1
        self.collect()
        self.remove()
        self.install()

    def install(self) -> None:
        """Add the hooks, if the next step is recorded."""
        if self.step % self.every:
            return
        self.find_norms()  # a patch may have replaced them
        for watched in self.norms:
            before, after = self.make_hooks(watched)
            self.handles.append(watched.module.register_forward_pre_hook(before, with_kwargs=True))
            self.handles.append(watched.module.register_forward_hook(after))
        if "torch._dynamo" in sys.modules:  # without it nothing can have been compiled
            self.stance = torch.compiler.set_stance("force_eager")

    def remove(self) -> None:
        for handle in self.handles:
            handle.remove()
        self.handles.clear()
        if self.stance is not None:
            self.stance.__exit__(None, None, None)
            self.stance = None

    # -- one norm ----------------------------------------------------------------------------------------------

    def make_hooks(self, watched: _Watched) -> tuple[Callable[..., Any], Callable[..., Any]]:
        inputs: list[Tensor] = []

        def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            inputs.clear()
            if module is not watched.module:  # a patch has moved the hooks to a new norm
                return None
            self.order.setdefault(watched.name, len(self.order))
            x = args[0] if args else next(iter(kwargs.values()), None)
            if not (torch.is_grad_enabled() and isinstance(x, Tensor)):
                return None
            inputs.append(x.detach())
            if not x.requires_grad:
                return None
            alias = x.view_as(x)
            alias.register_hook(functools.partial(self.input_gradient, watched))  # type: ignore[no-untyped-call]
            return ((alias, *args[1:]), kwargs) if args else (args, {**kwargs, next(iter(kwargs)): alias})

        def after(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            if inputs and isinstance(output, Tensor) and output.requires_grad:
                found = self.input_statistics(watched, inputs.pop())
                output.register_hook(functools.partial(self.output_gradient, watched, *found))  # type: ignore[no-untyped-call]

        return before, after

    @torch.no_grad()
    def input_statistics(self, watched: _Watched, x: Tensor) -> tuple[list[Tensor], Tensor, Any, Tensor | None]:
        """Return the first four of FIELDS, sigma per row, the factor from dl/d(output) to dl/dy, and the histogram."""
        info, module = watched.info, watched.module
        x = _rows(info, x)
        mean, var = _mean_and_var(x)
        if is_swapped(module) and not computes_n(type(module.inner)):  # there is no y
            nan = mean.new_full((), math.nan)
            return [mean.mean(), var.sqrt().mean(), nan, nan], nan, None, None
        if info.kind == "layernorm":
            y, _, rstd = torch.native_layer_norm(x, x.shape[-1:], None, None, info.eps)
            rstd = rstd.squeeze(-1)
            std = (rstd.pow(-2) - info.eps).clamp_min(0).sqrt()
        else:
            std = var.sqrt()
            rstd = (var + mean.square() + info.eps).rsqrt()
            y = x * rstd[..., None]
        k = getattr(module, "k", self.k)
        shares = [torch.count_nonzero(beyond) / y.numel() for beyond in (y * k >= 1, y * k > 0.5)]
        counts = torch.histc(y.clamp(*HISTOGRAM_RANGE), HISTOGRAM_BINS, *HISTOGRAM_RANGE) if self.histogram else None
        factor: Any = None
        if is_swapped(module):
            factor = module.backward_factor(y)
        elif info.gain_name is not None:
            gain = getattr(module, info.gain_name).detach()
            # A gain that is sharded, or gathered only for the moment, leaves dl/dy unknown.
            whole = type(gain) in (Tensor, nn.Parameter) and gain.numel() == y.shape[-1]
            factor = gain.flatten().float() + info.gain_offset if whole else math.nan
        return [mean.mean(), std.mean(), *shares], 1 / rstd, factor, counts

    @torch.no_grad()
    def output_gradient(
        self, watched: _Watched, forward: list[Tensor], sigma: Tensor, factor: Any, counts: Tensor | None, grad: Tensor
    ) -> None:
        grad = _rows(watched.info, grad)
        mean, var = _mean_and_var(grad)
        mean_y, var_y = (mean, var) if factor is None else _mean_and_var(grad * factor)
        detached = [(mean_y.abs() / sigma).mean(), (var_y / sigma.square()).mean()]
        watched.add("output", mean.numel(), torch.stack([*forward, mean.abs().mean(), var.mean(), *detached]))
        if counts is not None:
            watched.add("counts", 1, counts)

    @torch.no_grad()
    def input_gradient(self, watched: _Watched, grad: Tensor) -> None:
        mean, var = _mean_and_var(_rows(watched.info, grad))
        watched.add("input", mean.numel(), torch.stack([mean.abs().mean(), var.mean()]))

    # -- the end of a step -------------------------------------------------------------------------------------

    @torch.no_grad()
    def collect(self) -> None:
        """Turn the sums of the step into records, with one transfer from the device."""
        ran = sorted((watched for watched in self.norms if watched.sums), key=lambda watched: self.order[watched.name])
        if not ran:
            return
        vectors = [vector for watched in ran for _, vector in watched.sums.values()]
        numbers = iter(torch.cat([vector.to(vectors[0].device) for vector in vectors]).tolist())
        for watched in ran:
            sums = {part: list(itertools.islice(numbers, len(vector))) for part, (_, vector) in watched.sums.items()}
            means = {part: [total / watched.sums[part][0] for total in totals] for part, totals in sums.items()}
            values = (*means["output"], *means.get("input", (math.nan, math.nan)))
            statistics: dict[str, Any] = dict(zip(FIELDS, values, strict=True))
            about: dict[str, Any] = {"name": watched.name, "norm": watched.norm, "num_rows": watched.sums["output"][0]}
            self.log.records.append(NormRecord(step=self.step, **about, **statistics))
            if "counts" in sums:
                counts = torch.tensor(sums["counts"], dtype=torch.float64)
                self.log.histograms[watched.name] = self.log.histograms.get(watched.name, 0) + counts
            watched.sums = {}


def _rows(info: NormInfo, tensor: Tensor) -> Tensor:
    """Return the tensor as (rows, H), in at least float32."""
    if (to_local := getattr(tensor, "to_local", None)) is not None:
        tensor = to_local()  # a DTensor: tensor parallelism divides the rows
    if info.channels_first:
        tensor = tensor.movedim(1, -1)
    tensor = tensor.detach().flatten(-len(info.normalized_shape)).flatten(0, -2)
    return tensor.float() if tensor.dtype in (torch.float16, torch.bfloat16) else tensor


def _mean_and_var(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Return mean and biased variance of each row of (rows, H). `torch.var_mean` is ten times slower on a CPU."""
    mean = rows.mean(-1)
    square = torch.linalg.vector_norm(rows, dim=-1).square() / rows.shape[-1]
    return mean, (square - mean.square()).clamp_min(0)
