"""Distinguish norms on the residual stream from those inside a branch: query, key, latent and inner norms.

A norm is on the residual stream if it reads the stream (pre-norm), or if its output becomes part of the stream
(post-norm and sandwich norms). Names and widths do not decide this: OLMo 2 has query norms of full width, Swin changes
widths.

1. The tree of modules decides most norms: those outside of every stack of layers, and direct children of a layer that
   has no linear layer next to the norm. If it decides all norms, nothing runs.
2. Otherwise one forward pass over a few tokens decides. It records the storages that each undecided norm, its module
   and its layer read and write, and which tensors are added. The first layer of each form decides for all of them, and
   the pass ends once every norm is decided. It also works on the meta device.
3. The width alone decides norms that no pass reaches.
4. A stack whose norms would all be skipped has no residual stream (a plain CNN or MLP). It keeps all of them.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import mode
from typing import Any

from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from hf_adanorm.running import evaluating, hooked, quick_inputs
from hf_adanorm.state import tensors_in

from .probe import NormInfo

_PER_HEAD = "it acts per head"
_CONTAINERS = (nn.ModuleList, nn.ModuleDict, nn.Sequential)
_SUMS = {"add", "add_", "__add__", "__radd__", "__iadd__"}


def is_stack(module: nn.Module) -> bool:
    """Return whether `module` holds layers: an `nn.ModuleList`, or an `nn.Sequential` of blocks of one class."""
    if isinstance(module, nn.ModuleList):
        return True
    children = list(module.children())
    one_class = len({type(child) for child in children}) == 1
    return isinstance(module, nn.Sequential) and one_class and any(True for _ in children[0].children())


def off_stream(model: nn.Module, norms: Sequence[tuple[str, nn.Module, NormInfo]]) -> dict[str, str]:
    """Return the name of every norm inside a branch of a layer, with the reason; the others are on the stream.

    `norms` are those of `iter_norms(model)` that can be swapped. Runs the model over a few tokens if its structure
    leaves a norm undecided. The model's state stays the same.
    """
    norm_ids = {id(module) for _, module, _ in norms}
    found = (_place(model, name, module, info.normalized_shape, norm_ids) for name, module, info in norms)
    places = [place for place in found if place is not None]
    undecided = [place for place in places if not place.is_clear]
    if not undecided:
        return {}
    seen = _observe(model, undecided)
    reasons = dict.fromkeys((place.name for place in places), "")
    for place in undecided:
        reasons[place.name] = _verdict(seen[place.form], place) if place.form in seen else _by_width(place, places)
    # Plain networks normalize the outputs of linear layers.
    streams = {place.stack for place in places if not reasons[place.name] or reasons[place.name].startswith(_PER_HEAD)}
    return {place.name: reasons[place.name] for place in undecided if reasons[place.name] and place.stack in streams}


# ----------------------------------------------------------------------------------------------------- the structure


@dataclass(frozen=True, kw_only=True, eq=False)
class _Place:
    """Where a norm stands in a stack of layers."""

    name: str
    module: nn.Module
    width: int
    stack: str
    layer: nn.Module
    """The element of the innermost stack that holds the norm."""
    owner: nn.Module
    """The innermost module around the norm that holds more than norms: the layer, or a part of it."""
    owner_name: str
    """Relative to the layer; empty if the owner is the layer."""
    linears: Mapping[str, nn.Module]
    """Linear layers next to the norm and next to its owner, by their names within the layer."""
    form: tuple[Any, ...]
    """Equal for norms that play the same part in different layers."""

    @property
    def is_clear(self) -> bool:
        """Whether it is a direct child of a layer without linear layers of its own, whose branches are modules."""
        return self.owner is self.layer and not self.linears


def _place(model: nn.Module, name: str, norm: nn.Module, shape: tuple[int, ...], norm_ids: set[int]) -> _Place | None:
    """Return the norm's place, or None for a norm outside of every stack."""
    parts = name.split(".")
    path = [model]
    for part in parts:
        path.append(path[-1]._modules[part])  # type: ignore[arg-type]
    bare = [_is_bare(module, norm_ids) for module in path]
    depth = next((i for i in range(len(path) - 2, 0, -1) if is_stack(path[i - 1]) and not bare[i]), None)
    if depth is None:
        return None
    at = next(i for i in range(len(path) - 2, -1, -1) if not bare[i])
    layer, owner = path[depth], path[at]
    linears = _linears_beside(owner, norm_ids)
    if at > depth:
        linears |= _linears_beside(path[at - 1], norm_ids)
    names = {id(module): key for key, module in layer.named_modules()}
    return _Place(
        name=name,
        module=norm,
        width=shape[-1],
        stack=re.sub(r"\d+", "*", ".".join(parts[: depth - 1])),
        layer=layer,
        owner=owner,
        owner_name=".".join(parts[depth:at]),
        linears={names[id(module)]: module for module in linears.values()},
        form=(re.sub(r"\d+", "*", name), type(layer), type(owner), shape),
    )


def _is_bare(module: nn.Module, norm_ids: set[int]) -> bool:
    """Return whether the module is a container, or a wrapper that holds nothing but norms."""
    if isinstance(module, _CONTAINERS) or id(module) in norm_ids:
        return True
    own = any(True for _ in module.parameters(recurse=False))
    children = list(module.children())
    return bool(children) and not own and all(_is_bare(child, norm_ids) for child in children)


def _linears_beside(owner: nn.Module, norm_ids: set[int]) -> dict[int, nn.Module]:
    """Return, by id, the linear layers that `owner` holds itself or in containers."""
    found: dict[int, nn.Module] = {}
    for child in owner.children():
        if isinstance(child, _CONTAINERS) and not is_stack(child):
            found |= _linears_beside(child, norm_ids)
        elif isinstance(child, _CONTAINERS):
            found |= {id(m): m for m in child.children() if _is_linear(m)}
        elif _is_linear(child):
            found[id(child)] = child
    return found


def _is_linear(module: nn.Module) -> bool:
    """Return whether this is a linear layer of torch, a quantized one, an adapter around one, or GPT-2's Conv1D."""
    return (hasattr(module, "in_features") and hasattr(module, "out_features")) or hasattr(module, "nf")


def _by_width(place: _Place, places: Sequence[_Place]) -> str:
    """Compare with the width of the stream: the most common one among norms directly inside a layer of the stack."""
    widths = [other.width for other in places if other.stack == place.stack and other.owner is other.layer]
    if not widths or place.width == mode(widths):
        return ""
    return f"its width is {place.width}, that of the residual stream {mode(widths)}"


# ------------------------------------------------------------------------------------------------- one forward pass


class _DecidedError(Exception):
    """Ends a pass once every norm is decided."""


@dataclass(eq=False)
class _Sight:
    """One forward pass at a norm and at the modules around it. Storages are numbers."""

    place: _Place
    read: int
    shape: tuple[int, ...]
    made_by: str
    """The linear layer whose output the norm reads, or empty."""
    is_sum: bool
    wrote: int = 0
    owner_read: dict[int, tuple[int, ...]] = field(default_factory=dict)
    owner_wrote: dict[int, tuple[int, ...]] = field(default_factory=dict)
    layer_shape: tuple[int, ...] = ()
    reads_layer: bool = False
    """Its input is what a layer of a stack reads or returns."""
    is_added: bool = False
    """Its output is a term of a sum."""


def _verdict(sight: _Sight, place: _Place) -> str:
    """Return why a norm that was seen is not on the residual stream; empty if it is."""
    width = sight.layer_shape[-1] if sight.layer_shape else place.width
    if len(sight.layer_shape) > 3 and sight.layer_shape[1] == place.width:  # channels first
        width = place.width
    if sight.layer_shape and len(sight.shape) > len(sight.layer_shape) and place.width != width:
        return f"{_PER_HEAD}, on {place.width} of {width} channels"
    if sight.is_added:
        return ""
    is_branch = bool(set(sight.owner_read.values()) & set(sight.owner_wrote.values()))
    if sight.wrote in sight.owner_wrote and not is_branch:  # Swin V2 merges patches by a linear layer and a norm
        return ""
    if sight.made_by:
        return f"it normalizes the output of {sight.made_by}"
    if sight.is_sum or sight.reads_layer or sight.read in sight.owner_read or sight.wrote in sight.owner_wrote:
        return ""
    if not is_branch:
        return ""
    if place.owner is not place.layer:
        return f"it stands between the input and the output of {place.owner_name} ({type(place.owner).__name__})"
    return "" if width == place.width else f"its width is {place.width}, that of the residual stream {width}"


def _storage(tensor: Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)  # also tells storages on the meta device apart


def _floats(value: Any) -> dict[int, tuple[int, ...]]:
    return {_storage(t): tuple(t.shape) for t in tensors_in(value) if t.is_floating_point() and t.ndim > 1}


class _Watch(TorchFunctionMode):
    """The hooks of one pass, and its sums. `sights` are the norms seen so far, by form."""

    def __init__(self, undecided: Sequence[_Place], sights: dict[Any, _Sight]) -> None:
        super().__init__()
        self.sights = sights
        self.undecided = undecided
        self.wanted = {place.form for place in undecided}
        self.layers = {id(place.layer) for place in undecided}
        self.alive: list[Any] = []  # keeps storages from being given out again
        self.sums: dict[int, set[tuple[int, ...]]] = {}
        self.terms: set[int] = set()
        self.made_by: dict[int, str] = {}
        self.boundaries: set[int] = set()  # storages that layers read or return
        self.inputs: dict[int, dict[int, tuple[int, ...]]] = {}  # per module: storages and shapes

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        if getattr(func, "__name__", "") in _SUMS and isinstance(output, Tensor) and len(args) > 1:
            terms = [term for term in args[:2] if isinstance(term, Tensor) and term.ndim > 1]
            if len(terms) == 2 and terms[0].shape[-1] == terms[1].shape[-1]:  # neither a bias nor a number
                self.alive.append((terms, output))
                self.terms |= {_storage(term) for term in terms}
                self.sums.setdefault(_storage(output), set()).add(tuple(output.shape))
        return output

    def hooks(self) -> Iterator[Any]:
        linears: dict[int, tuple[nn.Module, str]] = {}
        owners: dict[int, nn.Module] = {}
        for place in self.undecided:
            linears |= {id(module): (module, name) for name, module in place.linears.items()}
            owners |= {id(place.owner): place.owner, id(place.layer): place.layer}
            yield place.module.register_forward_pre_hook(
                lambda _, args, kwargs, place=place: self.reads(place, args, kwargs), with_kwargs=True
            )
            yield place.module.register_forward_hook(lambda _, args, output, place=place: self.writes(place, output))
        for module, name in linears.values():
            yield module.register_forward_hook(lambda _, args, output, name=name: self.makes(name, output))
        for owner in owners.values():
            yield owner.register_forward_pre_hook(self.enters, with_kwargs=True, prepend=True)
            yield owner.register_forward_hook(self.leaves)

    def makes(self, name: str, output: Any) -> None:
        self.alive.append(output)
        self.made_by |= dict.fromkeys(_floats(output), name)

    def enters(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        self.alive.append((args, kwargs))
        found = self.inputs[id(module)] = _floats([*args, *kwargs.values()])
        if id(module) in self.layers:
            self.boundaries |= set(list(found)[:1])

    def reads(self, place: _Place, args: Any, kwargs: Any) -> None:
        x = next((t for t in tensors_in([*args, *kwargs.values()]) if t.is_floating_point()), None)
        if x is None or place.form in self.sights:
            return
        self.alive.append(x)
        key, shape = _storage(x), tuple(x.shape)
        sums = self.sums.get(key, set())  # a flattened image is a view of a sum with its channels first
        is_sum = shape in sums or any(len(s) == 4 > len(shape) and s[1] == place.width for s in sums)
        self.sights[place.form] = _Sight(
            place=place,
            read=key,
            shape=shape,
            made_by="" if is_sum else self.made_by.get(key, ""),
            is_sum=is_sum,
            owner_read=self.inputs.get(id(place.owner), {}),
            layer_shape=next(iter(self.inputs.get(id(place.layer), {}).values()), ()),
            reads_layer=key in self.boundaries,
        )

    def writes(self, place: _Place, output: Any) -> None:
        sight = self.sights.get(place.form)
        if sight is not None and sight.place is place and not sight.wrote:
            self.alive.append(output)
            sight.wrote = next(iter(_floats(output)), 0)

    def leaves(self, module: nn.Module, args: Any, output: Any) -> None:
        self.alive.append(output)
        wrote = _floats(output)
        if id(module) in self.layers:
            self.boundaries |= set(list(wrote)[:1])
        for sight in self.sights.values():
            if sight.place.owner is module and not sight.owner_wrote:
                sight.owner_wrote = wrote
            if sight.place.layer is module:
                sight.is_added |= sight.wrote in self.terms
        if id(module) in self.layers and self.wanted <= self.sights.keys():
            raise _DecidedError


def _observe(model: nn.Module, undecided: Sequence[_Place]) -> dict[Any, _Sight]:
    """Run the model over a few tokens until every form of norm was seen. Inputs that fail are skipped."""
    sights: dict[Any, _Sight] = {}
    for inputs in quick_inputs(model):
        watch = _Watch(undecided, sights)
        try:
            with hooked(watch.hooks()), evaluating(model), watch:
                model(**inputs)
        except MemoryError:
            raise
        except Exception:
            pass
        if watch.wanted <= sights.keys():
            break
    return sights
