"""Swap the norms of a model, put the replaced ones back, and list them: the public calls.

`patch_model` plans which norm becomes what, checks the whole plan, and only then replaces modules (`swapping.py`).
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from typing import Any, Literal, TypeVar

from torch import nn

from .affine import fold, warn_of_dropped
from .detection import check_module
from .folding import Fold
from .modeling_adanorm import is_swapped, replace_modules
from .norms import STOCK, check_settings, computes_n, resolve_norm
from .options import CHOICES
from .replaced import learned_affine, replaced_by
from .report import Report
from .saving import left_by_folds, mark_folded, swapped_norms, write_specs
from .selection import Patterns, Selection, check_choice, choose_norms, layer_positions
from .swapping import Options, all_or_nothing, apply_plan, make_plan, refuse_wrapped, restore_fused_path, restored

Targets = Literal["auto", "layernorm", "rmsnorm", "all"]
ModelT = TypeVar("ModelT", bound=nn.Module)


def patch_model(
    model: ModelT,
    norm: str | type[nn.Module] | partial[nn.Module] = "adanorm",
    *,
    include: Patterns = None,
    exclude: Patterns = None,
    layers: Iterable[int] | int | None = None,
    targets: Targets = "auto",
    eps: float | None = None,
    centered: bool | None = None,
    affine: Literal["drop", "fold"] | Fold = "drop",
    **settings: Any,
) -> ModelT:
    """Swap the norms of `model` in place and return it.

    The stock calls save, load and push the result. A second call changes only the norms that it matches, and the same
    call twice changes nothing. Build optimizers afterwards: earlier ones contain removed parameters.

    Args:
        model: any transformers model or plain `nn.Module`, on any device, also the meta device. Not yet wrapped by
            DDP, FSDP, DeepSpeed or `torch.compile`.
        norm: a name (`"adanorm"`, `"layernorm-simple"`, `"detachnorm"`, `"dyt"`, `"none"`, or one given to
            `register_norm`), an `nn.Module` class whose constructor takes `(normalized_shape, eps, ...)` and settings
            as keyword-only parameters, or a `functools.partial` of it. `"layernorm"` puts the replaced norms back.
        include: only these norms: a pattern or a list of them. A pattern is the ending of names in
            `model.named_modules()`. `*` matches anything between two dots, and at the end everything below:
            `"encoder.layer.1.*"`. `re:` starts a regular expression for the whole name.
        exclude: all except these, written in the same way.
        layers: only norms inside these layers, counted from 0 within every stack of layers, negative from the end.
        targets: `"auto"` swaps LayerNorms and RMSNorms on the residual stream. It skips query, key, latent and other
            norms inside a branch of a layer, unless `include` names them. `"layernorm"`, `"rmsnorm"` and `"all"` swap
            every norm of that kind. `"auto"` may run the model over a few tokens to see what a norm reads.
        eps: by default that of each replaced norm.
        centered: by default as the replaced norm: an RMSNorm does not subtract the mean. The paper's norms do. A fold
            keeps the function of the source, so it accepts neither another eps nor another centering.
        affine: what becomes of trained gains and biases. `"drop"` drops them. `"fold"` or `Fold(...)` folds them into
            the linear layers that read the norm; see `fold_affine`. A folded AdaNorm starts at k = 0 and C = 1, unless
            `Fold(unfoldable="calibrate", ...)` fits gains and biases to the given k and C.
        **settings: settings of the norm, such as C and k of AdaNorm. A mapping from names of norms gives each its own
            value (`calibrate_k(model, batches).k`); other norms take the default. A deep post-norm model that is
            trained from scratch loses its gradient with k = 0.1, whatever C is: start with 0.1 / sqrt(layers).

    Raises:
        TypeError, ValueError: an argument of the wrong type or out of range, a pattern that matches no norm, nothing
            to swap, a model that is already wrapped. After any error, the model is as it was.

    Example:
        >>> from transformers import BertConfig, BertModel
        >>> config = BertConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64)
        >>> model = patch_model(BertModel(config), "adanorm", C=1.0, k=0.1)
        >>> model.encoder.layer[0].output.LayerNorm
        AdaNorm((32,), eps=1e-12, C=1.0, k=0.1)
    """
    if not isinstance(affine, Fold):
        check_choice("affine", affine, CHOICES["affine"])
        affine = Fold() if affine == "fold" else affine
    choice: dict[str, Any] = {"include": include, "exclude": exclude, "layers": layers, "targets": targets}
    if norm == STOCK:
        if settings or eps is not None or centered is not None or affine != "drop":
            raise ValueError('norm="layernorm" puts the replaced norms back; it takes include, exclude and layers')
        refuse_wrapped(model)
        chosen = {row.name for row in choose_norms(model, Selection(**choice)) if row.chosen}
        return _put_back(model, [(name, module) for name, module in swapped_norms(model) if name in chosen])
    cls, given = resolve_norm(norm)
    settings = {**given, **settings}
    check_settings(cls, settings)
    options = Options(cls=cls, settings=settings, eps=eps, centered=centered, **choice)
    if affine != "drop" and not computes_n(cls):
        raise ValueError(
            f'affine="fold" does not go with norm="{options.norm}", which does not compute N(x): use affine="drop"'
        )
    plan = make_plan(model, options)
    with all_or_nothing(model) as change:
        report = None
        if isinstance(affine, Fold):
            report = fold(plan, change, affine)
        else:
            warn_of_dropped(plan, change)
        apply_plan(plan)
        if report is not None:
            mark_folded(model, report.names("folded", "approximated"))
    return model


def unpatch_model(model: ModelT) -> ModelT:
    """Put the replaced norms back, in place, and return the model.

    Gains and biases that a norm has learned go back into the norm that it replaced. Otherwise those of the replaced
    norm come back bit for bit. After a reload they are lost and become 1 and 0, with one warning. `config.adanorm` and
    our `auto_map` entries are removed.

    Raises:
        ValueError: the model is not patched, or already wrapped (DDP, FSDP, DeepSpeed, `torch.compile`).

    Example:
        >>> from transformers import BertConfig, BertModel
        >>> config = BertConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64)
        >>> model = unpatch_model(patch_model(BertModel(config)))
        >>> is_patched(model)
        False
    """
    refuse_wrapped(model)
    if not (swapped := swapped_norms(model)):
        raise ValueError(f"{type(model).__name__} has no swapped norm: there is nothing to restore")
    return _put_back(model, swapped)


def _put_back(model: ModelT, swapped: list[tuple[str, Any]]) -> ModelT:
    if not swapped:
        return model
    kept = [replaced_by(module) for _, module in swapped]
    lost = [norm for (_, norm), old in zip(swapped, kept, strict=True) if old is None or not old.has_values]
    fresh = sum(not learned_affine(norm) for norm in lost)
    with all_or_nothing(model, [old.module for old in kept if old is not None], stacklevel=5) as change:
        replace_modules(model, {id(norm): restored(norm) for _, norm in swapped})
        restore_fused_path(model)
        write_specs(model)  # loading needs to know the biases that a fold added
        if num_biases := len(left_by_folds(model)[0]):
            change.warn(
                f"{num_biases} linear layers keep the bias that a fold added: import hf_adanorm before you load the "
                "saved model, or transformers drops these biases with only a warning"
            )
        if fresh:
            change.warn(
                f"the checkpoint does not store the original gains and biases of {fresh} of {len(swapped)} norms; the "
                "restored norms start with gain 1 and bias 0"
            )
    return model


def is_patched(model: nn.Module) -> bool:
    """Return whether any norm of `model` is swapped.

    >>> is_patched(nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4)))
    False
    """
    check_module(model)
    return any(is_swapped(module) for module in model.modules())


def inspect_model(
    model: nn.Module,
    *,
    include: Patterns = None,
    exclude: Patterns = None,
    layers: Iterable[int] | int | None = None,
    targets: Targets = "auto",
) -> Report:
    """List every norm of `model`: what it computes, whether `patch_model` would swap it, and why not.

    The report prints as a table, and a notebook shows it as HTML. `*` in a name stands for every number; you can pass
    such names to `include`. `report.every_name()` lists the full names. The model is not changed.

    Raises:
        TypeError, ValueError: as `patch_model`, for the options.

    Example:
        >>> from transformers import BertConfig, BertModel
        >>> config = BertConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64)
        >>> report = inspect_model(BertModel(config))
        >>> report.num_swappable, report.num_affine_parameters
        (5, 320)
    """
    check_module(model)
    selection = Selection(include=include, exclude=exclude, layers=layers, targets=targets)
    rows = tuple(choose_norms(model, selection))
    positions = layer_positions(model, [row.name for row in rows])
    return Report(
        model_class=type(model).__name__,
        rows=rows,
        asked=selection != Selection(),
        num_layers=max((size for _, size in positions.values()), default=0),
    )
