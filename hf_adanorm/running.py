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


# --------------------------------------------------------------------------------------------------------- the inputs


def _setting(config: Any, *names: str, default: Any = None) -> Any:
    """The first of `names` that the config or one of its parts (text, vision, audio, encoder, decoder) has."""
    parts = [config]
    for part in ("text_config", "vision_config", "audio_config", "backbone_config", "encoder", "decoder"):
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


def _build(model: nn.Module, rows: int, ragged: bool) -> dict[str, Tensor]:
    config = model.config
    generator = torch.Generator().manual_seed(0)
    length = _text_length(config)
    main = getattr(model, "main_input_name", "input_ids")
    accepted = set(inspect.signature(model.forward).parameters)
    inputs: dict[str, Tensor] = {}
    if main == "input_ids" or ("input_ids" in accepted and "pixel_values" in accepted):
        inputs["input_ids"] = _token_ids(config, rows, length, generator)
        if ragged and "attention_mask" in accepted:
            mask = torch.ones(rows, length, dtype=torch.int64)
            mask[-1, : length // 3] = 0  # at the left, so that the end token stays last
            inputs["attention_mask"] = mask
    if main == "pixel_values" or ("pixel_values" in accepted and "input_ids" in accepted):
        inputs["pixel_values"] = _pixels(config, rows, generator)
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


def dummy_inputs(model: nn.Module) -> dict[str, Tensor]:
    """Keyword arguments with which `model(**inputs)` runs: text (with padding in one row), images or sound.

    Raises:
        ValueError: the model has no config, or none of the inputs tried is accepted; pass inputs of your own instead.
    """
    if getattr(model, "config", None) is None:
        raise ValueError("a model without a config needs fold_inputs={argument name: tensor, ...}")
    error: Exception | None = None
    for rows, ragged in ((2, True), (2, False), (1, False)):
        try:
            inputs = _build(model, rows, ragged)
            run(model, inputs)
        except Exception as exception:
            error = exception
        else:
            return inputs
    raise ValueError(
        f"{type(model).__name__} does not run on dummy inputs ({type(error).__name__}: {error}); "
        f"pass fold_inputs={{argument name: tensor, ...}} with a small real batch"
    )


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
