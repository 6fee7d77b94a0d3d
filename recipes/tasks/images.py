"""Image classification: from the options to splits of images, an image processor and a model."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset, Image, Value
from PIL import Image as PilImage
from PIL import ImageOps
from transformers import AutoImageProcessor, AutoModelForImageClassification, PreTrainedModel

try:
    from transformers import ViTImageProcessorPil
except ImportError:  # transformers 5.0, whose ViTImageProcessor is the one of PIL
    from transformers import ViTImageProcessor as ViTImageProcessorPil

from common.batches import StepPlan
from common.evaluation import main_first
from common.loop import Run
from common.options import OptionError
from tasks import image_cnn  # noqa: F401  (registers the CNN with the Auto classes)
from tasks.data import DataError, check_column, is_text, load_splits, resolve_labels, split_files
from tasks.models import (
    build_fresh,
    check_model_source,
    fresh_config,
    label_mappings,
    load_classifier,
    load_pretrained,
    try_out,
)
from tasks.text import ClassificationTask


def prepare_image(run: Run) -> ClassificationTask:
    """Load and check the data and the image processor. Raises DataError or OptionError on bad input.

    All images become RGB, as stock pipelines make them.
    """
    options, accelerator = run.options, run.accelerator
    check_model_source(options)
    if options.max_tokens is not None:
        raise OptionError("--max_tokens counts those of texts; for task image give --batch_size")
    raw = main_first(accelerator, lambda: load_splits(options))
    for split, data in raw.items():
        check_column(data, split, options.image_column, "image_column")
    names, labels = resolve_labels(raw, options.label_column, options.label_names, split_files(options))
    files = split_files(options)
    splits = {split: as_images(data, options.image_column, files.get(split)) for split, data in raw.items()}
    main_first(accelerator, lambda: run.is_main and _check_images(splits, options.image_column))
    processor = main_first(accelerator, lambda: _processor(options))

    def collate(rows: list[dict[str, Any]], augment: Callable[[PilImage.Image, int], PilImage.Image]) -> Any:
        images = [open_image(row[options.image_column], f"row {row['index'] + 1}") for row in rows]
        images = [augment(image, row["index"]) for image, row in zip(images, rows, strict=True)]
        batch_labels = torch.tensor([row["labels"] for row in rows])
        return {**processor(images=images, return_tensors="pt"), "labels": batch_labels}

    numbered = {
        split: data.select_columns(options.image_column)
        .add_column("labels", labels[split])
        .add_column("index", np.arange(len(data)))
        for split, data in splits.items()
    }
    lengths = {split: [1] * len(data) for split, data in numbered.items()}
    return ClassificationTask.of(
        StepPlan(lengths["train"], options.batch_size, **run.division),
        names,
        pipeline="image-classification",
        auto_class=AutoModelForImageClassification,
        processor=processor,
        build_model=lambda: _build_model(options, names),
        splits=numbered,
        lengths=lengths,
        raw_test=splits.get("test"),
        columns=[options.image_column],
        collate=partial(collate, augment=lambda image, index: image),
        train_collate=lambda epoch: partial(collate, augment=partial(augmented, options=options, epoch=epoch)),
    )


def as_images(data: Dataset, column: str, file: str | None) -> Dataset:
    """Return the column as encoded images; relative paths are relative to the file that names them."""
    if is_text(data.features[column]):
        folder = Path(file).resolve().parent if file else Path()
        data = data.map(lambda row: {column: None if row[column] is None else str(folder / row[column])})
        data = data.cast_column(column, Value("string"))  # datasets 4.0 cannot cast a `large_string`
    try:
        return data.cast_column(column, Image(decode=False))
    except Exception as error:  # pyarrow's errors differ by version
        raise DataError(
            f"column {column!r} contains {data.features[column]}, not images or paths of images"
        ) from error


def _check_images(splits: dict[str, Dataset], column: str) -> None:
    """Raise DataError saying where unless the headers of all images can be read."""
    for split, data in splits.items():
        for row, value in enumerate(data[column], start=1):
            with _opened(value, f"{split} split, row {row}"):
                pass


def open_image(value: dict[str, Any] | None, where: str) -> PilImage.Image:
    """Return an encoded image as RGB, turned as its EXIF orientation says; 16 bits are scaled to 8.

    Raises DataError naming the place of an image that cannot be read.
    """
    with _opened(value, where) as opened:
        image = ImageOps.exif_transpose(opened)
        if image.mode == "I" or image.mode.startswith("I;16"):
            values = np.asarray(image).astype(np.int64)
            if image.mode != "I" or values.max(initial=0) > 255:  # images of 32 bits may contain 8-bit values
                values //= 257
            return PilImage.fromarray(values.clip(0, 255).astype(np.uint8)).convert("RGB")
        return image.convert("RGB")


@contextmanager
def _opened(value: dict[str, Any] | None, where: str) -> Iterator[PilImage.Image]:
    if value is None:
        raise DataError(f"{where}: there is no image")
    try:
        source = io.BytesIO(value["bytes"]) if value["bytes"] is not None else value["path"]
        with PilImage.open(source) as image:
            yield image
    except (OSError, TypeError, SyntaxError, PilImage.DecompressionBombError) as error:
        raise DataError(f"{where}: not a readable image: {error}") from error


def augmented(image: PilImage.Image, index: int, *, options: Any, epoch: int) -> PilImage.Image:
    """Return a random variant of an image, which depends only on seed, epoch and example.

    So a run sees the same images however it is divided over workers and processes, or resumed.
    """
    draw = np.random.default_rng((options.seed, epoch, index))
    width, height = image.size
    if options.random_crop_padding:
        padding = options.random_crop_padding
        left, top = draw.integers(2 * padding + 1, size=2).tolist()
        image = ImageOps.expand(image, padding).crop((left, top, left + width, top + height))
    if options.random_resized_crop is not None:
        ratio = np.exp(draw.uniform(-1, 1) * np.log(4 / 3))  # width to height, as usual from 3/4 to 4/3
        area = draw.uniform(options.random_resized_crop, 1) * width * height
        w, h = min(width, round(np.sqrt(area * ratio)) or 1), min(height, round(np.sqrt(area / ratio)) or 1)
        left, top = int(draw.integers(width - w + 1)), int(draw.integers(height - h + 1))
        image = image.resize((width, height), PilImage.Resampling.BILINEAR, box=(left, top, left + w, top + h))
    if options.horizontal_flip and draw.random() < 0.5:
        image = ImageOps.mirror(image)
    return image


def _processor(options: Any) -> Any:
    if options.model_name_or_path:
        processor = load_pretrained(AutoImageProcessor, options.model_name_or_path)
        if options.image_size:
            resize_to(processor, options.image_size)
        return processor
    side = options.image_size or getattr(fresh_config(options), "image_size", None)
    if not isinstance(side, int):
        raise OptionError("--image_size is missing: the model's config has no image size")
    half = [0.5] * 3
    return ViTImageProcessorPil(size={"height": side, "width": side}, image_mean=half, image_std=half)


def resize_to(processor: Any, side: int) -> None:
    """Set an image processor, and its crop, to images of `side` x `side`.

    Raises OptionError for a processor that then gives other sizes or a frame around the image.
    """
    crop, shortest = getattr(processor, "crop_size", None), (processor.size or {}).get("shortest_edge")
    if shortest:
        before = (crop.get("height") if crop else None) or shortest
        processor.size = {"shortest_edge": max(side, round(shortest * side / before))}
    else:
        processor.size = {"height": side, "width": side}
    if crop:
        processor.crop_size = {"height": side, "width": side}
    white = PilImage.new("RGB", (4 * side, 3 * side), "white")
    pixels = processor(images=white, return_tensors="pt")["pixel_values"][0]
    if pixels.shape[-2:] != (side, side) or bool((pixels.amax((1, 2)) - pixels.amin((1, 2)) > 1e-3).any()):
        raise OptionError(
            f"--image_size {side}: {type(processor).__name__} cannot be set to another size; omit the option"
        )


def _build_model(options: Any, names: Sequence[str]) -> PreTrainedModel:
    if options.model_name_or_path:
        model = load_classifier(AutoModelForImageClassification, options.model_name_or_path, names)
        if options.image_size:
            images = torch.zeros(1, 3, options.image_size, options.image_size)
            try_out(model, f"images of --image_size {options.image_size}", pixel_values=images)
    else:
        sizes = {"image_size": options.image_size} if options.image_size else {}
        side = options.model_config.get("image_size", options.image_size)
        if options.image_size and side not in (options.image_size, [options.image_size] * 2):
            raise OptionError(f"--image_size {options.image_size} is not the image_size of model_config: {side}")
        config = fresh_config(options, **sizes, **label_mappings(names))
        model = build_fresh(AutoModelForImageClassification, config)
    channels = getattr(model.config, "num_channels", 3)
    if channels != 3:
        raise OptionError(f"the model's num_channels is {channels}; images are read as RGB: it must be 3")
    return model
