"""Inputs that a tiny model's forward accepts, guessed from the names of its arguments and the fields of its config.

`run(model)` tries the guesses, most complete first, and returns the inputs that worked with their output.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

from tests.zoo import tiny_models
from tests.zoo.tiny_models import LENGTH, VOCAB, UnsupportedError

ROWS = 2
Inputs = dict[str, Any]


class _Maker:
    """Make inputs by the names of forward's arguments."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.model, self.config = model, model.config
        self.generator = torch.Generator().manual_seed(0)
        self.names = inspect.signature(model.forward).parameters

    def get(self, *names: str, default: Any = None, within: str = "") -> Any:
        """Return the first of `names` that a config in the config has, fields that match `within` before others."""
        parts: list[tuple[bool, Any]] = []

        def collect(config: Any, near: bool) -> None:
            parts.append((not near, config))
            for key, value in vars(config).items():
                if isinstance(value, PreTrainedConfig):
                    collect(value, near or bool(within and re.search(within, key)))

        collect(self.config, not within)
        ordered = sorted(parts, key=lambda part: part[0])
        found = (getattr(part, name, None) for _, part in ordered for name in names)
        return next((value for value in found if value is not None), default)

    def number(self, *names: str, default: int = 0, within: str = "") -> int:
        """Return the first of these fields as a number; of several, as for (width, height), the last."""
        value = self.get(*names, default=default, within=within)
        return int(value if isinstance(value, (int, float, str)) else value[-1])

    def floats(self, *shape: int, rows: int = ROWS) -> Tensor:
        return torch.randn(rows, *shape, generator=self.generator)

    def ids(self, length: int = LENGTH) -> Tensor:
        vocab = self.number("vocab_size", within="text|llm|decoder", default=VOCAB)
        high = max(4, min(vocab, VOCAB) - 32)  # the end of the vocabulary is for special tokens
        return torch.randint(3, high, (ROWS, length), generator=self.generator)

    def image_shape(self) -> tuple[int, int, int]:
        where, fields = "vision|image|vit", ("num_channels", "in_channels", "in_chans", "image_channels")
        size = self.get("image_size", "img_size", "input_size", "crop_size", within=where, default=64)
        if isinstance(size, dict):
            size = (size.get("height", 64), size.get("width", 64))
        height, width = (size, size) if isinstance(size, int) else tuple(size)[-2:]
        channels = self.get(*fields, within=where, default=3)
        return channels if isinstance(channels, int) else 3, int(height), int(width)

    def images(self) -> Tensor:
        return self.floats(*self.image_shape())

    def video(self) -> Tensor:
        return self.floats(self.number("num_frames", "frames_per_clip", default=2), *self.image_shape())

    def patches(self, frames: int = 1, count: int = 16) -> Tensor:
        """Make (rows * count, channels * frames * patch * patch), the flat patches of image-grid vision towers."""
        patch = self.number("patch_size", within="vision", default=14)
        channels = self.number("in_channels", "num_channels", "in_chans", within="vision", default=3)
        return self.floats(channels * frames * patch * patch, rows=ROWS * count)

    def flattened_patches(self) -> Tensor:
        flat = self.floats(16, self.number("patch_embed_hidden_size", default=32) + 2)
        flat[..., :2] = torch.arange(1, 17)[:, None] % 4 + 1
        return flat

    def sound(self) -> Tensor:
        bins, length = self.get("num_mel_bins"), self.get("max_length")
        if bins and isinstance(length, int) and length > 100:  # spectrogram transformers
            return self.floats(length, int(bins))
        channels = self.get("audio_channels") if self.model.main_input_name == "input_values" else None
        return self.floats(channels, 2400) if channels else self.floats(4000)

    def features(self) -> Tensor:
        fields = ("num_mel_bins", "input_feat_per_channel", "feature_projection_input_dim", "n_mels", "input_dim")
        bins = self.number(*fields, "feature_size", "input_feat_size", within="audio|encoder", default=80)
        positions = self.get("max_source_positions", within="audio|encoder")
        bins_first = positions and hasattr(self.config, "max_source_positions")
        if bins_first or self.get("n_window"):
            return self.floats(bins, 2 * int(positions or 32))
        return self.floats(64, bins)

    def embeddings(self) -> Tensor:
        width = self.get("hidden_size", "d_model", "embed_dim", "dim", default=32)
        return self.floats(LENGTH, width if isinstance(width, int) else int(width[0]))

    def series(self, name: str) -> Tensor:
        """Make one of the inputs of forecasting models."""
        lags = self.get("lags_sequence")
        past = self.number("context_length", default=16) + (max(lags) if lags else 0)
        if name == "past_values":
            channels = self.number("num_input_channels", "input_size", default=1)
            return self.floats(past, channels) if channels > 1 or not lags else self.floats(past)
        if name == "past_observed_mask":
            return torch.ones(ROWS, past)
        steps = past if name.startswith("past") else self.number("prediction_length", default=4)
        features = self.number("num_time_features")
        return self.floats(steps) if name == "future_values" else self.floats(steps, features)

    def make(self, name: str) -> Any:
        """Return a value for the argument `name`, None if its name says nothing."""
        if name == "inputs" and self.get("conv_kernel"):
            return self.sound()
        if "musicgen" in self.config.model_type and name in ("input_ids", "decoder_input_ids"):
            is_text = name == "input_ids" and self.config.model_type in ("musicgen", "musicgen_melody")
            return self.ids() if is_text else self.ids().repeat(self.number("num_codebooks", default=4), 1)
        if name in _SERIES:
            return self.series(name)
        return next((make(self) for names, make in _BY_NAME.items() if name in names.split()), None)

    def made(self, *names: str) -> Inputs:
        """Return the values of those arguments that forward has and whose names say something."""
        values = {name: self.make(name) for name in names if name in self.names}
        return {name: value for name, value in values.items() if value is not None}


_BY_NAME: dict[str, Callable[[_Maker], Any]] = {
    "input_ids decoder_input_ids text_input_ids inputs qformer_input_ids task_inputs": _Maker.ids,
    "pixel_values image prompt_pixel_values prompt_masks pixel_values_images": _Maker.images,
    "pixel_values_videos videos video_values": _Maker.video,
    "input_values audio_values audio waveform": _Maker.sound,
    "input_features audio_features audio_input_features spectrogram audio_mel": _Maker.features,
    "hidden_states inputs_embeds encoder_hidden_states query_embeds features hidden_state": _Maker.embeddings,
    "flattened_patches": _Maker.flattened_patches,
    "bbox": lambda m: torch.randint(0, 20, (ROWS, LENGTH, 4), generator=m.generator).sort(-1).values,
    "grid_thw image_grid_thw": lambda m: torch.tensor([[1, 4, 4]] * ROWS),
    "image_grid_hws grid_hws spatial_shapes tgt_sizes target_sizes": lambda m: torch.tensor([[4, 4]] * ROWS),
    "image_sizes": lambda m: torch.tensor([m.image_shape()[1:]] * ROWS),
    "merge_sizes": lambda m: torch.full((ROWS,), 2),
    "aspect_ratio_ids": lambda m: torch.ones(ROWS, 1, dtype=torch.long),
    "is_longer": lambda m: torch.zeros(ROWS, 1, dtype=torch.bool),
    "states": lambda m: m.floats(LENGTH, int(m.config.state_dim)),
    "actions": lambda m: m.floats(LENGTH, int(m.config.act_dim)),
    "rewards returns_to_go": lambda m: m.floats(LENGTH, 1),
    "timesteps": lambda m: torch.arange(LENGTH).expand(ROWS, LENGTH),
    "visual_feats": lambda m: m.floats(4, int(m.config.visual_feat_dim)),
    "visual_pos": lambda m: torch.rand(ROWS, 4, 4, generator=m.generator),
}
"""How a value is made, by the names of the arguments that take it."""
_SERIES = ("past_values", "past_time_features", "past_observed_mask", "future_values", "future_time_features")


def _guesses(model: PreTrainedModel) -> Iterator[Inputs]:
    """Yield arguments for forward, most complete first."""
    maker = _Maker(model)
    names = maker.names
    variadic = (inspect.Parameter.VAR_KEYWORD, inspect.Parameter.VAR_POSITIONAL)
    required = [name for name, p in names.items() if p.default is p.empty and p.kind not in variadic]
    main = model.main_input_name if isinstance(model.main_input_name, str) else None
    base = list(dict.fromkeys([*required, *([main] if main in names else [])])) or [next(iter(names))]
    made = maker.made(*base)
    yield from _unusual(maker, base, made)

    extra = maker.made("visual_feats", "visual_pos", *(["bbox"] if "input_ids" in made else []), "decoder_input_ids")
    if "returns_to_go" in names:
        extra |= maker.made("states", "actions", "rewards", "returns_to_go", "timesteps")
    if "encoder_hidden_states" in names and "query_embeds" in made:
        extra["encoder_hidden_states"] = maker.floats(5, maker.number("encoder_hidden_size", default=32))
    for name in required:
        if name.endswith("mask") and name not in made:
            first = next((v for v in made.values() if isinstance(v, Tensor)), None)
            length = LENGTH if first is None else first.shape[-1 if "features" in name and first.shape[1] < 130 else 1]
            extra[name] = torch.ones(ROWS, length, dtype=torch.long)
    if "past_values" in names:
        extra |= maker.made(*_SERIES[1:])
    usual = {**made, **extra}
    if "input_ids" in names and "input_features" in names and "input_features" not in made:
        yield from _with_sound(maker, usual)
    if "input_ids" in names and "pixel_values" in names and main == "input_ids":
        yield from _with_images(maker, usual)
    for name in ("input_ids", "pixel_values"):
        if name in names and name not in made:
            yield {**usual, name: maker.make(name)}
    if extra:
        yield usual
    yield made
    if "input_features" in made:
        for bins_and_length in ((80, 128), (64, 80), (128, 128), (128, 80), (128, 200), (64, 128), (64, 560)):
            given = {**usual, "input_features": maker.floats(*bins_and_length)}
            yield given
            for length in bins_and_length:
                ones = torch.ones(ROWS, length, dtype=torch.bool)
                yield {name: ones if name.endswith("mask") else value for name, value in given.items()}
        if "input_features_mask" in names:
            for length in made["input_features"].shape[1:]:
                yield {**usual, "input_features_mask": torch.ones(ROWS, length, dtype=torch.long)}
    if any(name.endswith("mask") for name in extra):
        yield {name: value.bool() if name.endswith("mask") else value for name, value in usual.items()}
    if "hidden_states" in made and "mask" in names:
        yield {"hidden_states": maker.floats(64, 80), "mask": torch.ones(ROWS, 64, dtype=torch.bool)}
    if "aspect_ratio_ids" in made:
        pixels = maker.floats(1, maker.number("max_num_tiles", default=4), *maker.image_shape())
        yield {**made, "pixel_values": pixels, "aspect_ratio_mask": torch.ones(pixels.shape[:3], dtype=torch.long)}
    if "input_values" in made:
        for shape in ((1, 2400), (2400,), (2400, 80), (1, 9600), (2, 2400)):
            yield {**usual, "input_values": maker.floats(*shape)}
    if "pixel_values" in made:
        for size in (32, 64, 128, 224, 256):
            yield {**usual, "pixel_values": maker.floats(3, size, size)}
        for frames in dict.fromkeys((2, 4, maker.number("num_frames", default=2))):
            yield {**usual, "pixel_values": maker.floats(frames, *maker.image_shape())}


def _unusual(maker: _Maker, base: list[str], made: Inputs) -> Iterator[Inputs]:
    """Yield complete inputs of models whose arguments must fit each other in ways of their own."""
    names = maker.names
    if "grid_thw" in base or (base[0] in ("hidden_states", "pixel_values") and "image_grid_thw" in base):
        for frames in (maker.number("temporal_patch_size", default=1), 1):  # a vision tower on flat patches
            yield {**made, base[0]: maker.patches(frames)}
    if "spatial_shapes" in names and "pixel_attention_mask" in names:  # images as ragged patches
        pixels = maker.patches().reshape(ROWS, 16, -1)
        mask = torch.ones(ROWS, 16, dtype=torch.long)
        yield {**maker.made("input_ids", "spatial_shapes"), "pixel_values": pixels, "pixel_attention_mask": mask}
    if "is_longer" in names:
        size, bins = maker.number("spec_size", default=256), maker.number("num_mel_bins", default=64)
        yield {**made, **maker.made("is_longer"), "input_features": maker.floats(1, size * size // bins, bins)}
    if "context_input_ids" in names:  # retrieval-augmented generation without its retriever
        docs = maker.number("n_docs", default=5)
        context = {"context_input_ids": maker.ids().repeat_interleave(docs, 0), "doc_scores": maker.floats(docs)}
        mask = torch.ones(ROWS * docs, LENGTH, dtype=torch.long)
        yield {**made, **context, "context_attention_mask": mask, "decoder_input_ids": maker.ids(3)}
    if "feature_lens" in names:  # audio encoders on ragged, concatenated spectrograms
        lengths = {"feature_lens": torch.tensor([40, 40]), "aftercnn_lens": torch.tensor([20, 20])}
        sound = maker.floats(80, rows=maker.number("num_mel_bins", default=128))
        yield {"input_features": sound, **{name: value for name, value in lengths.items() if name in names}}
    if "prompt_pixel_values" in names:
        yield {name: maker.floats(3, 32, 32) for name in ("pixel_values", "prompt_pixel_values", "prompt_masks")}
    if "image_embeds_position_mask" in names:
        count = maker.number("latent_query_num", default=4)
        mask = torch.zeros(ROWS, count + 4, dtype=torch.long)
        mask[:, 1 : count + 1] = 1
        text = maker.ids(count + 4)
        yield {**maker.made("pixel_values"), "input_ids": text, "image_embeds_position_mask": mask}


def _with_sound(maker: _Maker, usual: Inputs) -> Iterator[Inputs]:
    """Yield text with sound in it, the bins of the spectrogram as its first or its second axis."""
    features = maker.features()
    token = maker.get("audio_token_id", "audio_token_index")
    mask = next((name for name in ("input_features_mask", "feature_attention_mask") if name in maker.names), None)
    for sound in (features, features.transpose(1, 2)):
        if mask and isinstance(token, int):
            text = usual["input_ids"].clone()
            text[:, 2] = token
            heard = torch.ones(ROWS, sound.shape[-1], dtype=torch.long)
            yield {**usual, "input_ids": text, "input_features": sound, mask: heard}
    for sound in (features, features.transpose(1, 2)):
        yield {**usual, "input_features": sound}


def _with_images(maker: _Maker, usual: Inputs) -> Iterator[Inputs]:
    """Yield text with an image in it: one placeholder token, to be repeated as the model asks (see `run`)."""
    names, ids = maker.names, usual["input_ids"].clone()
    token = maker.get("image_token_id", "image_token_index", "media_token_id")
    if isinstance(token, int):
        ids[:, 2] = token
    if grid := next((name for name in ("image_grid_thw", "image_grid_hws", "grid_thw") if name in names), None):
        for frames in dict.fromkeys((maker.number("temporal_patch_size", within="vision", default=1), 1)):
            kinds = {"mm_token_type_ids": (ids == token).long()} if "mm_token_type_ids" in names else {}
            yield {**usual, "input_ids": ids, "pixel_values": maker.patches(frames), **maker.made(grid), **kinds}
    pixels = maker.images()
    plain = {**usual, "input_ids": ids, "pixel_values": pixels}
    sizes = maker.made("image_sizes")
    yield {**plain, **sizes}
    one = {**plain, "pixel_values": pixels[:, None], **sizes}
    yield one
    if sizes:
        yield plain
    if "image_attention_mask" in names:
        yield {**one, "image_attention_mask": torch.ones(ROWS, ids.shape[1], 1, dtype=torch.long)}
    if frames := maker.number("num_frames"):
        yield {**one, "pixel_values": pixels[:, None].repeat(1, frames, 1, 1, 1)}


_MISMATCH = re.compile(r"tokens:? *(\d+).*?features:? *(\d+)", re.DOTALL)


def _call(model: PreTrainedModel, inputs: Inputs) -> tuple[Inputs, Any]:
    """Run; where the model says how many placeholder tokens it wants, repeat them and run again."""
    try:
        return inputs, model(**inputs)
    except ValueError as error:
        maker = _Maker(model)
        found = _MISMATCH.search(str(error))
        kinds = ("image", "media", "audio") if "mage" in str(error) else ("audio",)
        token = maker.get(*(f"{kind}_token_{end}" for kind in kinds for end in ("id", "index")))
        if not found or "input_ids" not in inputs or not isinstance(token, int):
            raise
        have, want = int(found[1]), int(found[2])
        text, width = inputs["input_ids"], maker.number("hidden_size", within="text", default=1)
        text = torch.where(text == token, torch.tensor(4), text) if have else text
        for count in (want // ROWS, want // ROWS // width):  # some messages count numbers, not tokens
            if not 0 < count < 2000:
                continue
            ids = torch.cat([text[:, :2], torch.full((ROWS, count), token), text[:, 2:]], dim=1)
            again = {**inputs, "input_ids": ids}
            if "mm_token_type_ids" in inputs:
                again["mm_token_type_ids"] = (ids == token).long()
            try:
                return again, model(**again)
            except ValueError as second:
                error = second
        raise error


def run(model: PreTrainedModel) -> tuple[Inputs, Any]:
    """Return inputs the model accepts and its output for them. Raise the first error if there are none."""
    first: Exception | None = None
    for inputs in _guesses(model):
        try:
            torch.manual_seed(0)
            with torch.no_grad():
                inputs, output = _call(model, inputs)
        except Exception as error:
            first = first or error
            continue
        if tensors(output):
            return inputs, output
    raise first or UnsupportedError("no tensor came out")


def runnable(model_type: str, model_class: type[PreTrainedModel] | None = None) -> tuple[PreTrainedModel, Inputs]:
    """Return a tiny model of this type (its preferred class by default) that runs, and inputs for it."""
    first: Exception | None = None
    for _, config in tiny_models.configs(model_type):
        try:
            model = tiny_models.build(model_class or tiny_models.model_classes(model_type, config)[0], config)
            return model, run(model)[0]
        except Exception as error:  # this way to shrink the config does not suit
            first = first or error
    raise UnsupportedError(f"no tiny {model_type} runs") from first


def tensors(output: Any) -> list[Tensor]:
    """Return all floating tensors in an output, in order."""
    if isinstance(output, Tensor):
        return [output] if output.is_floating_point() else []
    if isinstance(output, dict):
        output = list(output.values())
    elif hasattr(output, "__dict__") and not isinstance(output, (list, tuple)):
        output = [v for k, v in sorted(vars(output).items()) if isinstance(v, (Tensor, list, tuple, dict))]
    return [t for item in output for t in tensors(item)] if isinstance(output, (list, tuple)) else []
