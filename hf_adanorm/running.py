"""Run a model in evaluation mode without leaving a trace, on inputs that its forward accepts."""

from __future__ import annotations

import contextlib
import inspect
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from .state import State, random_states

_LENGTH = 12
# A progress bar, shown on a terminal and only if something takes more than a few seconds.
SLOW_BAR: dict[str, Any] = {"delay": 4.0, "disable": None, "leave": False}
T = TypeVar("T")

# ------------------------------------------------------------------------------------------------------------ the run


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Run the block with `model` in evaluation mode, without gradients and from seed 0. Restore all state afterwards.

    Modules return to their mode through `train(flag)`, one by one: some merge or unmerge weights there. `State` then
    restores whatever else changed (attributes, hooks, buffers, weights).
    """
    state, modes = State(model), [(module, module.training) for module in model.modules()]
    try:
        with random_states(model), torch.no_grad(), state.recording():
            try:
                model.eval()
                yield
            finally:
                for module, mode in modes:  # parents come first, as train() reaches their children, too
                    if module.training is not mode:
                        module.train(mode)
    finally:
        state.restore()


@contextlib.contextmanager
def hooked(handles: Iterable[Any]) -> Iterator[None]:
    """Run the block with the hooks that iterating over `handles` registers."""
    with contextlib.ExitStack() as stack:
        for handle in handles:
            stack.callback(handle.remove)
        yield


class Inputs(NamedTuple):
    """Keyword arguments of one forward pass."""

    values: dict[str, Any]
    unseen_masks: list[str]
    """Padding masks that the model takes but that these inputs lack."""


def first_accepted(
    model: nn.Module, given: Mapping[str, Any] | None, run: Callable[[Inputs], T], *, hidden_states: bool = False
) -> T:
    """Return `run(inputs)` for the first inputs with which it does not raise.

    Args:
        model: its forward decides which inputs are tried.
        given: keyword arguments of the user; None for inputs made from the model's config.
        run: runs the model.
        hidden_states: also ask for hidden states, if the model returns them on request.

    Raises:
        ValueError: the model has no config and `given` is None, or it accepts none of the inputs. The message quotes
            the model's first error.
        MemoryError: a pass ran out of memory.
    """
    if given is None and getattr(model, "config", None) is None:
        raise ValueError("a model without a config needs inputs={argument name: tensor, ...}")
    error: Exception | None = None  # the first
    for rows, kind in ((2, ""), (1, ""), (2, "video"), (2, "text")) if given is None else ((0, ""),):
        try:
            inputs: dict[str, Any] = dict(_build(model, rows, kind) if given is None else given)
            for candidate in _with_masks(model, inputs, hidden_states):
                try:
                    return run(candidate)
                except MemoryError:
                    raise
                except Exception as exception:  # of whatever kind the model makes of inputs that do not fit
                    last = exception
            raise last
        except MemoryError:
            raise
        except Exception as exception:
            error = error or exception
    tried = "dummy inputs" if given is None else f"inputs={{{', '.join(map(str, given))}}}"
    advice = "; pass inputs={argument name: tensor, ...} with a small real batch" if given is None else ""
    raise ValueError(
        f"{type(model).__name__} does not run on {tried} ({type(error).__name__}: {error}){advice}"
    ) from error


def dummy_inputs(model: nn.Module) -> dict[str, Any]:
    """Return keyword arguments with which `model(**inputs)` runs: text, images, video or sound, some of it padding.

    Raises:
        ValueError: the model has no config, or accepts none of the inputs that were tried.
    """

    def run(inputs: Inputs) -> dict[str, Any]:
        with evaluating(model):
            model(**inputs.values)
        return inputs.values

    return first_accepted(model, None, run)


# ------------------------------------------------------------------------------------------------------- dummy inputs


def _setting(config: Any, *names: str, default: Any = None) -> Any:
    """Return the first of `names` that the config, or one of its parts (text, vision, audio, encoder), has."""
    parts = [f"{part}_config" for part in ("text", "vision", "audio", "backbone", "encoder")]
    configs = [config, *(getattr(config, part, None) for part in (*parts, "encoder", "decoder"))]
    values = (getattr(each, name, None) for each in configs for name in names)
    return next((value for value in values if value is not None), default)


def _token_ids(config: Any, rows: int, generator: torch.Generator) -> Tensor:
    """Return int64 (rows, length) within the model's positions. Each row has one end token, at its end: some heads
    look for it."""
    positions = int(_setting(config, "max_position_embeddings", "n_positions", default=-1))
    length = _LENGTH if positions < 1 else max(min(_LENGTH, positions - 2), 1)  # XLNet: -1, some types keep two back
    vocabulary = int(_setting(config, "vocab_size", default=100))
    ids = torch.randint(min(4, vocabulary - 1), vocabulary, (rows, length), generator=generator)
    end = _setting(config, "eos_token_id")
    if isinstance(end, int) and 0 <= end < vocabulary:
        ids[ids == end] = (end + 1) % vocabulary
        ids[:, -1] = end
    return ids


def _pixels(config: Any, rows: int, generator: torch.Generator) -> Tensor:
    """Return float (rows, channels, height, width)."""
    size = _setting(config, "image_size", "input_size", "crop_size", default=64)
    height, width = (size, size) if isinstance(size, int) else tuple(size)[-2:]
    channels = int(_setting(config, "num_channels", "in_channels", "in_chans", default=3))
    return torch.randn(rows, channels, int(height), int(width), generator=generator)


def _sound(name: str, config: Any, rows: int, generator: torch.Generator) -> Tensor:
    bins = _setting(config, "num_mel_bins", "input_feat_per_channel", "feature_projection_input_dim")
    if name == "input_values" and _setting(config, "conv_kernel") is not None:
        return torch.randn(rows, 4000, generator=generator)  # raw samples
    if getattr(config, "max_source_positions", None) and getattr(config, "model_type", "") == "whisper":
        return torch.randn(rows, int(bins), 2 * int(config.max_source_positions), generator=generator)
    length = int(_setting(config, "max_length", default=64) or 64) if name == "input_values" else 64
    return torch.randn(rows, length, int(bins or 80), generator=generator)


def _build(model: nn.Module, rows: int, kind: str = "") -> dict[str, Any]:
    """Return unpadded inputs of every modality. `kind`: "video" makes images into videos, "text" leaves them out."""
    config = model.config
    generator = torch.Generator().manual_seed(0)
    main = getattr(model, "main_input_name", "input_ids")
    accepted = set(inspect.signature(model.forward).parameters)
    inputs: dict[str, Tensor] = {}
    if main == "input_ids" or {"input_ids", "pixel_values"} <= accepted:
        inputs["input_ids"] = _token_ids(config, rows, generator)
    if main == "pixel_values" or ({"input_ids", "pixel_values"} <= accepted and kind != "text"):
        inputs["pixel_values"] = _pixels(config, rows, generator)
    if "pixel_values" in inputs and "spatial_shapes" in accepted:  # images as rows of flat patches
        patch = int(_setting(config, "patch_size", default=16))
        channels = int(_setting(config, "num_channels", default=3))
        inputs["pixel_values"] = torch.randn(rows, 4, channels * patch**2, generator=generator)
        inputs["pixel_attention_mask"] = torch.ones(rows, 4, dtype=torch.int64)
        inputs["spatial_shapes"] = torch.full((rows, 2), 2)
    if kind == "video":
        main = "pixel_values" if main == "pixel_values" else "pixel_values_videos"
        frames = int(_setting(config, "num_frames", "frames_per_clip", default=4))
        inputs[main] = torch.stack([_pixels(config, rows, generator) for _ in range(frames)], dim=1)
    if main in ("input_features", "input_values"):
        inputs[main] = _sound(main, config, rows, generator)
    if not inputs:
        raise ValueError(f"no dummy inputs are known for a model whose main input is {main!r}")
    if getattr(config, "is_encoder_decoder", False) and "decoder_input_ids" in accepted:
        inputs["decoder_input_ids"] = _token_ids(config, rows, generator)
    if "bbox" in accepted and "input_ids" in inputs:
        inputs["bbox"] = torch.zeros(*inputs["input_ids"].shape, 4, dtype=torch.int64)
    parameter = next(model.parameters())
    return {
        name: value.to(parameter.device, parameter.dtype if value.is_floating_point() else None)
        for name, value in inputs.items()
    }


def quick_inputs(model: nn.Module) -> Iterator[dict[str, Any]]:
    """Yield inputs of one short row without masks. A model without a config gets none; it may refuse any of them."""
    for kind in ("", "video", "text") if getattr(model, "config", None) is not None else ():
        try:
            inputs = _build(model, 1, kind)
        except Exception:  # a config that lacks what it takes
            continue
        yield inputs


# ------------------------------------------------------------------------------------------------------ padding masks

# Masks that mark padding, and the inputs whose positions they cover: the first that is present counts.
_SOUND = ("input_features", "input_values", "audio_values", "input_audio_embeds")
PADDING_MASKS = {
    "attention_mask": ("input_ids", "inputs_embeds", *_SOUND, "flattened_patches"),
    "decoder_attention_mask": ("decoder_input_ids", "decoder_inputs_embeds"),
    "pixel_mask": ("pixel_values",),
    "pixel_attention_mask": ("pixel_values",),
    "padding_mask": _SOUND,
    "padding_mask_videos": ("pixel_values_videos",),
    "input_features_mask": _SOUND,
    "feature_attention_mask": _SOUND,
    "audio_attention_mask": _SOUND,
}


def _with_masks(model: nn.Module, inputs: Mapping[str, Any], hidden_states: bool) -> Iterator[Inputs]:
    """Yield `inputs` with every padding mask that the model takes, unless they have one that masks something; then
    with masks of other shapes and types, with fewer, and with none. The likeliest come first."""
    parameters = inspect.signature(model.forward).parameters
    options = {name: masks for name in PADDING_MASKS if name in parameters and (masks := _masks(name, inputs))}
    asked = {"output_hidden_states": True} if hidden_states else {}
    if asked:
        yield Inputs({**asked, **inputs, **{name: masks[0] for name, masks in options.items()}}, [])
    for choice in itertools.islice(itertools.product(*options.values()), 6):
        yield Inputs({**inputs, **dict(zip(options, choice, strict=True))}, [])
    for left_out in options if len(options) > 1 else ():
        yield Inputs({**inputs, **{n: masks[0] for n, masks in options.items() if n != left_out}}, [left_out])
    if options:
        yield Inputs({**asked, **inputs}, list(options))
        yield Inputs(dict(inputs), list(options))


def _masks(name: str, inputs: Mapping[str, Any]) -> list[Tensor]:
    """Return masks to try, of the likeliest shape first; none if the inputs have no use for one or show one."""
    covered = next((value for key in PADDING_MASKS[name] if isinstance(value := inputs.get(key), Tensor)), None)
    given = inputs.get(name)
    shows = given is not None and not (isinstance(given, Tensor) and given.ndim == 2 and bool((given != 0).all()))
    if covered is None or covered.ndim < 2 or shows:
        return []
    *start, height, width = covered.shape
    shapes: list[tuple[int, ...]] = [(*start[:-1], height, width)] if covered.ndim > 3 else []
    shapes += [tuple(covered.shape[:2])] if covered.ndim != 4 else []
    shapes += [(*start, width)] if covered.ndim == 3 else []  # whose features come first
    return [mask for shape in shapes for mask in _paddings(shape, covered.device)]


def _paddings(shape: Sequence[int], device: torch.device) -> Iterator[Tensor]:
    """Yield masks that pad the first row at its end, with and without padding at the start of the last row."""
    # Most of a row stays real. An eighth of a long row is at least 8 positions, and of a short row a third at least 1.
    part = max(shape[-1] // (3 if shape[-1] < 64 else 8), 1)
    for at_start in (part, 0) if shape[0] > 1 else (0,):
        mask = torch.ones(tuple(shape), dtype=torch.int64, device=device)
        mask[-1, ..., :at_start] = 0
        mask[0, ..., shape[-1] - part :] = 0
        yield from (mask, mask.bool())


def real_rows(model: nn.Module, name: str, inputs: Mapping[str, Any], shape: Sequence[int]) -> Tensor | None:
    """Return which positions at the norm `name` are not padding: bool of `shape` (batch, length), or None if unknown.

    The decoder of an encoder-decoder has its own mask; without one, it has no padding.
    """
    two_sided = bool(getattr(getattr(model, "config", None), "is_encoder_decoder", False))
    in_decoder = two_sided and "decoder" in name.split(".")
    mask = inputs.get("decoder_attention_mask" if in_decoder else "attention_mask")
    if not isinstance(mask, Tensor) or tuple(mask.shape) != tuple(shape):
        return None
    return mask.to(torch.bool)
