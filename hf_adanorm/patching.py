"""Swap the norms of a model, take the swap back, and say what is there.

`patch_model` makes a plan (which norm becomes what, and why another does not), checks all of it, and only then moves
modules: a call patches everything it planned or leaves the model as it was. Then it writes down what is swapped, for
stock saving and loading:

1. `iter_norms` lists the norms by what they compute; `targets`, `include`, `exclude` and `layers` choose among them.
2. Every chosen norm gets its `NormGroup`; what loading could not read off the stock module (a hard-coded eps, say) is
   put into the group, so that the saved spec decides nothing by itself.
3. The modules are replaced. Each keeps the one it replaced, for `unpatch_model`.
4. Every config in the model becomes the model's own copy (two models built from one config object share it), and gets
   the resolved spec of the part of the model that it describes.
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
from .saving import left_by_folds, mark_folded, plain_modules, swapped_norms, write_specs
from .selection import Patterns, check_layers, layer_positions
from .swapping import (
    Options,
    all_or_nothing,
    apply_plan,
    check_choice,
    choose,
    make_plan,
    refuse_wrapped,
    restore_fused_path,
    restored,
)

Targets = Literal["auto", "layernorm", "rmsnorm", "all"]
ModelT = TypeVar("ModelT", bound=nn.Module)


# ------------------------------------------------------------------------------------------- the public functions


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

    Save, load and push it with the stock calls afterwards. A second call changes only the norms it matches, and the
    same call twice changes nothing. Optimizers built before hold parameters that are gone: build them afterwards.

    Args:
        model: any transformers model or plain `nn.Module`, on any device, the meta device included. Not yet wrapped
            by DDP, FSDP, DeepSpeed or `torch.compile`.
        norm: the norm to swap in. A name (`"adanorm"`, `"layernorm-simple"`, `"detachnorm"`, `"dyt"`, `"none"`, or one
            given to `register_norm`), a class, or a `functools.partial` of a class. A class of your own is an
            `nn.Module` whose constructor takes `(normalized_shape, eps, ...)`, with its settings as keyword-only
            parameters. `"layernorm"` puts the replaced norms back.
        eps: None keeps that of each replaced norm.
        centered: None keeps what the replaced norm does (an RMSNorm does not subtract the mean). True is the paper's.
            A fold starts from the function of the source, and so takes neither another eps nor another
            centering.
        include: only these norms. A pattern or a list of them: the ending of names (of `model.named_modules()`). `*`
            stands for anything between two dots, and at the end for everything below: `"encoder.layer.1.*"`. `re:`
            starts a regular expression for the whole name.
        exclude: all except these, written in the same way.
        layers: only norms inside these layers, counted from 0 within every stack of layers, negative from the end.
        targets: `"auto"` swaps LayerNorms and RMSNorms on the residual stream. It skips query, key, latent and other
            norms inside a branch of a layer, unless `include` names them. `"layernorm"`, `"rmsnorm"` and `"all"` swap
            every norm of that kind. `"auto"` may run the model over a few tokens to see what a norm reads.
        affine: what becomes of trained gains and biases. `"drop"` drops them; `"fold"` or `Fold(...)` folds them into
            the linear layers that read the norm, see `fold_affine`. A folded AdaNorm starts at k = 0 and C = 1, unless
            `Fold(unfoldable="calibrate", ...)` fits gains and biases to the k and C that it gets.
        **settings: settings of the norm, such as C and k of AdaNorm. A mapping gives a value for each norm by its
            name (`calibrate_k(model, batches).k`); norms that it does not list take the default. A deep post-norm
            model that is trained from scratch loses its gradient with k = 0.1, whatever C; start with
            0.1 / sqrt(layers).

    Raises:
        TypeError, ValueError: an argument of the wrong type or out of range, a pattern that matches no norm, nothing
            to swap, a model that is already wrapped. The model is as it was then, as after whatever else is raised
            (a KeyboardInterrupt, a warning of this call that a filter turns into an error).

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
    choice: dict[str, Any] = {
        "include": include,
        "exclude": exclude,
        "layers": check_layers(layers),
        "targets": targets,
    }
    if norm == STOCK:
        if settings or eps is not None or centered is not None or affine != "drop":
            raise ValueError('norm="layernorm" puts the replaced norms back; it takes include, exclude and layers')
        return _restore(model, Options(**choice))
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
            mark_folded(model, report.names("folded", "approximated"), weightless=False)
    return model


def unpatch_model(model: ModelT) -> ModelT:
    """Put the replaced norms back, in place, and return the model.

    Gains and biases that a norm has learned go back into the norm that it replaced. Otherwise those of the replaced
    norm come back bit for bit; where they are lost (after a reload), they become 1 and 0, with one warning.
    `config.adanorm` and our `auto_map` entries are removed.

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


def _restore(model: ModelT, options: Options) -> ModelT:
    """Put back the replaced norms that the options choose, if any."""
    refuse_wrapped(model)
    chosen = {row.name for row in choose(model, options) if row.chosen}
    swapped = [(name, module) for name, module in swapped_norms(model) if name in chosen]
    return _put_back(model, swapped) if swapped else model


def _put_back(model: ModelT, swapped: list[tuple[str, Any]]) -> ModelT:
    kept = [replaced_by(module) for _, module in swapped]
    lost = [old is None or not old.has_values for old in kept]
    fresh = sum(gone and not learned_affine(norm) for gone, (_, norm) in zip(lost, swapped, strict=True))
    with all_or_nothing(model, [old.module for old in kept if old is not None], stacklevel=5) as change:
        replace_modules(model, restored(model, swapped))
        restore_fused_path(model)
        write_specs(model)  # biases that a fold added stay, and loading has to know of them
        if num_biases := len(left_by_folds(dict(plain_modules(model)))[0]):
            change.warn(
                f"{num_biases} linear layers keep the bias that a fold gave them: load what is saved from now on with "
                "hf_adanorm imported, as without it transformers leaves those biases out with no more than a warning"
            )
        if fresh:
            change.warn(
                f"the checkpoint does not store the original gains and biases of {fresh} of {len(swapped)} norms; the "
                "restored norms start with gain 1 and bias 0"
            )
    return model


def is_patched(model: nn.Module) -> bool:
    """Whether any norm of `model` is swapped.

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

    Prints as a table and shows as HTML in a notebook. `*` in a name stands for every number, and `include` takes a
    list of such names; `report.every_name()` spells all of them out. Changes nothing.

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
    options = Options(include=include, exclude=exclude, layers=check_layers(layers), targets=targets)
    rows = tuple(choose(model, options))
    positions = layer_positions(model, [row.name for row in rows])
    return Report(
        model_class=type(model).__name__,
        rows=rows,
        asked=options != Options(),
        num_layers=max((size for _, size in positions.values()), default=0),
    )
