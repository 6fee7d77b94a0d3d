"""A model run once in evaluation mode: the run itself, small inputs that its forward accepts, and where they are
padded."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

_LENGTH = 12
# A progress bar for a terminal, and only for what takes more than some seconds.
SLOW_BAR: dict[str, Any] = {"delay": 4.0, "disable": None, "leave": False}

# ------------------------------------------------------------------------------------------------------------ the run


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode, no gradients, random numbers from seed 0; afterwards the training flags and the random states
    of the CPU and of the model's GPUs are as they were."""
    devices = sorted({parameter.device.index for parameter in model.parameters() if parameter.is_cuda})
    training = {module: module.training for module in model.modules()}
    try:
        model.eval()
        with torch.no_grad(), torch.random.fork_rng(devices=devices):
            for generator in (torch.default_generator, *(torch.cuda.default_generators[i] for i in devices)):
                generator.manual_seed(0)
            yield
    finally:
        for module, flag in training.items():
            module.training = flag


def run(model: nn.Module, inputs: Mapping[str, Any]) -> Any:
    """The output of one forward pass in evaluation mode."""
    with evaluating(model):
        return model(**inputs)


@contextlib.contextmanager
def hooked(handles: Iterable[Any]) -> Iterator[None]:
    """The hooks of `handles`, which are registered as it is gone through, for the length of a block."""
    with contextlib.ExitStack() as stack:
        for handle in handles:
            stack.callback(handle.remove)
        yield


def tensors_in(value: Any) -> Iterator[Tensor]:
    """The tensors of nested arguments or outputs, in order."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (Mapping, list, tuple)):
        for item in value.values() if isinstance(value, Mapping) else value:
            yield from tensors_in(item)


# --------------------------------------------------------------------------------------------------------- the inputs


def _setting(config: Any, *names: str, default: Any = None) -> Any:
    """The first of `names` that the config or one of its parts (text, vision, audio, encoder, decoder) has."""
    parts = [config]
    nested = [f"{part}_config" for part in ("text", "vision", "audio", "backbone", "encoder")]
    for part in (*nested, "encoder", "decoder"):
        value = getattr(config, part, None)
        if value is not None and not isinstance(value, (str, int, float, dict)):
            parts.append(value)
    for candidate in parts:
        for name in names:
            value = getattr(candidate, name, None)
            if value is not None:
                return value
    return default


def _text_length(config: Any) -> int:
    """Tokens in a row: few, and fewer where a tiny model has no positions for them (some types keep two back)."""
    positions = int(_setting(config, "max_position_embeddings", "n_positions", default=-1))
    return _LENGTH if positions < 1 else max(min(_LENGTH, positions - 2), 1)  # XLNet has -1: as many as you like


def _token_ids(config: Any, rows: int, length: int, generator: torch.Generator) -> Tensor:
    """int64 (rows, length): random tokens with the end token exactly once in each row, where some heads look for
    it."""
    vocabulary = int(_setting(config, "vocab_size", default=100))
    ids = torch.randint(min(4, vocabulary - 1), vocabulary, (rows, length), generator=generator)
    end = _setting(config, "eos_token_id")
    if isinstance(end, int) and 0 <= end < vocabulary:
        ids[ids == end] = (end + 1) % vocabulary
        ids[:, -1] = end
    return ids


def _pixels(config: Any, rows: int, generator: torch.Generator) -> Tensor:
    """float (rows, channels, height, width)."""
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


def _build(model: nn.Module, rows: int, video: bool) -> dict[str, Tensor]:
    config = model.config
    generator = torch.Generator().manual_seed(0)
    length = _text_length(config)
    main = getattr(model, "main_input_name", "input_ids")
    accepted = set(inspect.signature(model.forward).parameters)
    inputs: dict[str, Tensor] = {}
    if main == "input_ids" or ("input_ids" in accepted and "pixel_values" in accepted):
        inputs["input_ids"] = _token_ids(config, rows, length, generator)
    if main == "pixel_values" or ("pixel_values" in accepted and "input_ids" in accepted):
        inputs["pixel_values"] = _pixels(config, rows, generator)
    if video:
        main = "pixel_values" if main == "pixel_values" else "pixel_values_videos"
        frames = int(_setting(config, "num_frames", "frames_per_clip", default=4))
        inputs[main] = torch.stack([_pixels(config, rows, generator) for _ in range(frames)], dim=1)
    if main in ("input_features", "input_values"):
        inputs[main] = _sound(main, config, rows, generator)
    if not inputs:
        raise ValueError(f"no dummy inputs are known for a model whose main input is {main!r}")
    if getattr(config, "is_encoder_decoder", False) and "decoder_input_ids" in accepted:
        inputs["decoder_input_ids"] = _token_ids(config, rows, length, generator)
    if "bbox" in accepted:
        inputs["bbox"] = torch.zeros(rows, length, 4, dtype=torch.int64)
    parameter = next(model.parameters())
    return {
        name: value.to(parameter.device, parameter.dtype if value.is_floating_point() else None)
        for name, value in inputs.items()
    }


def quick_inputs(model: nn.Module) -> Iterator[dict[str, Any]]:
    """Yield keyword arguments that may let `model(**inputs)` reach its layers with little work, cheapest first.

    One row of a few tokens, without masks. A decoder comes first by itself, on a made-up output of the encoder.
    Yields nothing for a model without a config. Whether the model accepts them is for the caller to find out.
    """
    if getattr(model, "config", None) is None:
        return
    for video in (False, True):
        try:
            inputs: dict[str, Any] = dict(_build(model, 1, video))
        except Exception:  # a config that lacks what it takes
            continue
        if "decoder_input_ids" in inputs and not video:
            width = int(_setting(model.config, "d_model", "hidden_size", default=1))
            encoded = torch.ones(1, 4, width, device=(p := next(model.parameters())).device, dtype=p.dtype)
            yield {"decoder_input_ids": inputs["decoder_input_ids"], "encoder_outputs": (encoded,)}
        yield inputs
        if "input_ids" in inputs and len(inputs) > 1:
            yield {"input_ids": inputs["input_ids"]}


# Masks that say what is padding, and the inputs whose positions they cover: the first that is there counts.
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


def _shapes(model: nn.Module, inputs: Mapping[str, Any], covered: Tensor) -> Iterator[Sequence[int]]:
    """Shapes that a mask of an input may have: of its positions; failing that, of what the model makes of them."""
    *start, height, width = covered.shape
    if covered.ndim > 3:
        yield (*start[:-1], height, width)
    if covered.ndim != 4:
        yield covered.shape[:2]
    if covered.ndim == 3:  # whose features come first
        yield (*start, width)
    made: dict[Sequence[int], None] = {}

    def note(module: nn.Module, args: Any, output: Any) -> None:
        if isinstance(output, Tensor) and output.ndim == 3:
            made[tuple(output.shape[:2])] = None

    with hooked(module.register_forward_hook(note) for module in model.modules()):
        run(model, inputs)
    yield from list(made)[:4]


def _paddings(shape: Sequence[int], device: torch.device) -> Iterator[Tensor]:
    """Masks that pad a third: of the first row at its end, of the last of several at its beginning, or not there."""
    third = shape[-1] // 3
    for at_start in (third, 0) if shape[0] > 1 else (0,):
        mask = torch.ones(tuple(shape), dtype=torch.int64, device=device)
        mask[-1, ..., :at_start] = 0
        mask[0, ..., shape[-1] - third :] = 0
        yield from (mask, mask.bool())


def with_masks(model: nn.Module, inputs: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """`inputs` with every padding mask that the model takes and that they lack, or that masks nothing there; and the
    names of the masks with which the model does not run."""
    accepted = inspect.signature(model.forward).parameters
    found, failed = dict(inputs), []
    for name, covers in PADDING_MASKS.items():
        covered = next((value for key in covers if isinstance(value := inputs.get(key), Tensor)), None)
        given = inputs.get(name)
        shows = given is not None and not (isinstance(given, Tensor) and given.ndim == 2 and bool((given != 0).all()))
        if name not in accepted or covered is None or covered.ndim < 2 or shows:
            continue
        masks = (mask for shape in _shapes(model, inputs, covered) for mask in _paddings(shape, covered.device))
        fitting = next((mask for mask in masks if _runs(model, {**found, name: mask})), None)
        if fitting is None:
            failed.append(name)
        else:
            found[name] = fitting
    return found, failed


def _runs(model: nn.Module, inputs: Mapping[str, Any]) -> bool:
    try:
        run(model, inputs)
    except MemoryError:
        raise
    except Exception:  # of whatever kind the model makes of inputs that do not fit
        return False
    return True


def dummy_inputs(model: nn.Module) -> dict[str, Tensor]:
    """Keyword arguments with which `model(**inputs)` runs: text, images, video or sound, padded as `with_masks` pads.

    Raises:
        ValueError: the model has no config, or none of the inputs tried is accepted; pass inputs of your own instead.
    """
    if getattr(model, "config", None) is None:
        raise ValueError("a model without a config needs fold_inputs={argument name: tensor, ...}")
    error: Exception | None = None
    for rows, video in ((2, False), (1, False), (2, True)):
        try:
            inputs = _build(model, rows, video)
            padded, _ = with_masks(model, inputs)
            if padded.keys() == inputs.keys():
                run(model, inputs)
        except MemoryError:
            raise
        except Exception as exception:
            error = error or exception
            continue
        for key, mask in (("input_ids", "attention_mask"), ("decoder_input_ids", "decoder_attention_mask")):
            if key in padded and mask in padded:
                _end_before_padding(padded[key], padded[mask], getattr(model.config, "pad_token_id", None))
        return padded if _runs(model, padded) else inputs
    raise ValueError(
        f"{type(model).__name__} does not run on dummy inputs ({type(error).__name__}: {error}); "
        f"pass fold_inputs={{argument name: tensor, ...}} with a small real batch"
    )


def _end_before_padding(ids: Tensor, mask: Tensor, pad: Any) -> None:
    """The end token of the first row stands before its padding, where some heads look for it."""
    real = int(mask[0].sum())
    ids[0, real - 1] = ids[0, -1].clone()
    if isinstance(pad, int) and pad >= 0 and real < ids.shape[1]:
        ids[0, real:] = pad


def real_rows(model: nn.Module, name: str, inputs: Mapping[str, Any], shape: Sequence[int]) -> Tensor | None:
    """bool of `shape` (batch, length): which positions at the norm `name` are no padding; None where nothing tells.

    In an encoder-decoder the decoder has a mask of its own, and without one no padding.
    """
    two_sided = bool(getattr(getattr(model, "config", None), "is_encoder_decoder", False))
    in_decoder = two_sided and "decoder" in name.split(".")
    mask = inputs.get("decoder_attention_mask" if in_decoder else "attention_mask")
    if not isinstance(mask, Tensor) or tuple(mask.shape) != tuple(shape):
        return None
    return mask.to(torch.bool)
