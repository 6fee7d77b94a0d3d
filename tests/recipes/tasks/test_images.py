"""The classification recipe on images: the small CNN, any vision model, IDX files, augmentation."""

import argparse
import io
import json
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from transformers import AutoModelForImageClassification, pipeline

import classification
import predict
from common.endings import OptionError
from tasks.idx_images import load_idx_images, write_idx
from tasks.images import augmented, open_image, resize_to
from tasks.options import ImageOptions
from tests.recipes.fault_runs import flags
from tests.recipes.recipe_process import read_results

CNN = {"model_type": "layernorm_cnn", "image_size": 8, "hidden_sizes": [8, 8, 8]}
VIT = {"model_type": "vit", "image_size": 8, "patch_size": 4, "hidden_size": 16, "num_hidden_layers": 1}
VIT |= {"num_attention_heads": 2, "intermediate_size": 16}


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    """Bright squares in the left or in the right half of noise, as IDX files."""
    folder = tmp_path_factory.mktemp("digits")
    draw = np.random.default_rng(0)
    files = {}
    for split, size in {"train": 64, "validation": 21}.items():
        labels = draw.integers(2, size=size).astype(np.uint8)
        images = draw.integers(60, size=(size, 8, 8)).astype(np.uint8)
        for image, label in zip(images, labels, strict=True):
            image[2:6, 4 * label : 4 * label + 4] += 150
        files[split] = folder / f"{split}-images-idx3-ubyte.gz"
        write_idx(files[split], images)
        write_idx(folder / f"{split}-labels-idx1-ubyte.gz", labels)
    return files


def run(digits, folder, **changes):
    options = {
        "task": "image",
        "train_file": digits["train"],
        "validation_file": digits["validation"],
        "model_config": json.dumps(CNN),
        "batch_size": 16,
        "num_epochs": 5,
        "learning_rate": 0.01,
        "output_dir": folder,
        **changes,
    }
    classification.main(flags(options))
    return read_results(folder)


@pytest.fixture(scope="module")
def trained(digits, tmp_path_factory):
    """The CNN, tested on its own validation file: both accuracies must agree."""
    folder = tmp_path_factory.mktemp("trained")
    return folder, run(digits, folder, test_file=digits["validation"], random_crop_padding=1, k=0.07)


def test_the_cnn_learns_and_scores_the_same_in_a_fresh_process(trained):
    _, results = trained
    assert results["norm_modules"] == 3
    assert results["validation"]["accuracy"] > 90
    assert results["test"]["accuracy"] == results["validation"]["accuracy"]


def test_the_cnn_loads_elsewhere_by_the_code_it_travels_with(trained, digits):
    folder, _ = trained
    pixels = torch.linspace(-1, 1, 3 * 8 * 8).view(1, 3, 8, 8)
    here = AutoModelForImageClassification.from_pretrained(folder / "best")(pixels).logits
    code = (
        "import sys, torch, hf_adanorm\n"
        "from transformers import AutoModelForImageClassification\n"
        f"model = AutoModelForImageClassification.from_pretrained({str(folder / 'best')!r}, trust_remote_code=True)\n"
        "norms = [m for m in model.modules() if getattr(m, 'is_adanorm_module', False)]\n"
        "pixels = torch.linspace(-1, 1, 3 * 8 * 8).view(1, 3, 8, 8)\n"
        "print([(m.norm_name, m.k) for m in norms], model(pixels).logits.double().tolist())\n"
    )
    there = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=folder)
    assert there.returncode == 0, there.stderr
    assert there.stdout.strip() == f"{[('adanorm', 0.07)] * 3} {here.double().tolist()}"


def test_the_best_model_works_in_a_stock_pipeline(trained):
    folder, _ = trained
    classify = pipeline("image-classification", str(folder / "best"))
    right = np.zeros((8, 8), dtype=np.uint8)
    right[2:6, 4:] = 180
    assert classify(Image.fromarray(right))[0]["label"] == "1"


def test_a_fresh_and_then_pretrained_vit_from_paths_in_a_table(digits, tmp_path, capsys):
    data = load_idx_images(digits["train"])
    rows = []
    for index, row in enumerate(data):
        row["image"].save(tmp_path / f"{index}.png")
        rows.append({"picture": f"{index}.png", "side": ["left", "right"][row["label"]]})
    table = tmp_path / "table.jsonl"
    table.write_text("\n".join(map(json.dumps, rows)) + "\n")
    files = {"train_file": table, "validation_file": table, "image_column": "picture", "label_column": "side"}
    fresh = run(digits, tmp_path / "fresh", model_config=json.dumps(VIT), num_epochs=1, **files)
    assert fresh["validation"]["accuracy"] >= 40
    changes = {"model_config": "{}", "model_name_or_path": tmp_path / "fresh" / "best", "learning_rate": 1e-9}
    tuned = run(digits, tmp_path / "tuned", max_steps=1, test_file=table, **files, **changes)
    assert tuned["validation"]["accuracy"] == fresh["validation"]["accuracy"] == tuned["test"]["accuracy"]
    with pytest.raises(SystemExit, match="2"):
        run(digits, tmp_path / "larger", image_size=16, **files, **changes)
    assert "vit cannot be given images of --image_size 16: ValueError: " in capsys.readouterr().err
    model = AutoModelForImageClassification.from_pretrained(tmp_path / "tuned" / "best")
    assert model.config.id2label == {0: "left", 1: "right"}


def test_a_table_is_predicted_as_the_recipe_reads_it(trained, tmp_path):
    for name, column in (("left", 0), ("right", 4)):  # of 16 bits: clipped to 8, both would be white
        pixels = np.full((8, 8), 30 * 257, dtype=np.uint16)
        pixels[2:6, column : column + 4] = 180 * 257
        Image.fromarray(pixels).save(tmp_path / f"{name}.png")
    (tmp_path / "table.csv").write_text("image\nleft.png\nright.png\nleft.png\n")
    settings = {"batch_size": 2, "mixed_precision": "no", "columns": ["image"], "trust_remote_code": False}
    files = {"model": str(trained[0] / "best"), "data": str(tmp_path / "table.csv")}
    text, what = predict.predict(argparse.Namespace(task="image", **files, **settings))
    assert [row["label"] for row in json.loads(text)] == ["0", "1", "0"]
    assert what == "3 predictions"


def test_photos_are_turned_as_their_exif_orientation_says():
    exif = Image.Exif()
    exif[0x0112] = 6  # shown after a turn by 90 degrees clockwise
    stored = Image.new("RGB", (8, 4), "black")
    stored.paste("white", (0, 0, 4, 4))  # the left half: after the turn the upper one
    stored.save(file := io.BytesIO(), format="PNG", exif=exif)
    pixels = np.asarray(open_image({"bytes": file.getvalue(), "path": None}, "row 1"))
    assert pixels.shape == (8, 4, 3)
    assert (pixels[:4] == 255).all()
    assert (pixels[4:] == 0).all()


@pytest.mark.parametrize("side", [96, 384])
@pytest.mark.parametrize("name", ["CLIP", "ConvNext", "DeiT", "MobileViT", "MobileNetV1", "ViT"])
def test_an_image_size_sets_the_crop_too(name, side):
    processor = getattr(transformers, f"{name}ImageProcessor")()
    resize_to(processor, side)
    white = Image.new("RGB", (300, 200), "white")
    pixels = processor(images=white, return_tensors="pt")["pixel_values"][0]
    assert pixels.shape[-2:] == (side, side)
    assert all(channel.unique().numel() == 1 for channel in pixels)  # no black frame


def test_a_processor_without_a_single_size_is_refused():
    with pytest.raises(OptionError, match=r"--image_size 96: Siglip2.* cannot be set to another size"):
        resize_to(transformers.Siglip2ImageProcessor(), 96)


def augment(image, index=0, epoch=0, seed=3, **options):
    options = SimpleNamespace(seed=seed, **vars(ImageOptions(**options)))
    return np.asarray(augmented(image, index, options=options, epoch=epoch))


def test_augmentation_depends_on_seed_epoch_and_example_alone():
    options = {"random_crop_padding": 2, "random_resized_crop": 0.5, "horizontal_flip": True}
    image = Image.fromarray(np.random.default_rng(0).integers(256, size=(12, 10, 3)).astype(np.uint8))
    keys = [(0, 0, 3), (1, 0, 3), (0, 1, 3), (0, 0, 4)]
    variants = [augment(image, *key, **options) for key in keys]
    assert len({variant.tobytes() for variant in variants}) == 4
    assert all((augment(image, *key, **options) == variant).all() for key, variant in zip(keys, variants, strict=True))
    assert variants[0].shape == (12, 10, 3)


@pytest.mark.parametrize(
    ("option", "check"),
    [
        ({"random_crop_padding": 1}, lambda a, b: any((np.roll(a, s, (0, 1)) == b).mean() > 0.5 for s in OFFSETS)),
        ({"horizontal_flip": True}, lambda a, b: (a[:, ::-1] == b).all() or (a == b).all()),
        ({}, lambda a, b: (a == b).all()),
    ],
)
def test_every_augmentation_does_what_it_says(option, check):
    pixels = np.random.default_rng(1).integers(256, size=(8, 8, 3)).astype(np.uint8)
    assert all(check(pixels, augment(Image.fromarray(pixels), index, **option)) for index in range(8))


OFFSETS = [(down, right) for down in (-1, 0, 1) for right in (-1, 0, 1)]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"image_column": "picture"}, "--image_column 'picture': the train split has no such column"),
        ({"image_column": "label"}, "not images or paths of images"),
        ({"random_resized_crop": 2}, "--random_resized_crop must be in (0, 1]"),
        ({"model_config": json.dumps({**CNN, "image_size": 4})}, "image_size 4 cannot be halved 3 times"),
        ({"model_config": json.dumps({**VIT, "num_channels": 1})}, "num_channels is 1; images are read as RGB"),
        ({"max_tokens": 64}, "--max_tokens counts those of texts; for task image give --batch_size"),
        ({"model_config": json.dumps(CNN), "image_size": 9}, "--image_size 9 is not the image_size of model_config"),
    ],
)
def test_bad_input_ends_in_one_line(changes, said, digits, tmp_path, capsys):
    with pytest.raises(SystemExit, match="2"):
        run(digits, tmp_path / "run", **changes)
    assert said in capsys.readouterr().err


@pytest.mark.parametrize(
    ("broken", "said"),
    [("missing.png", "row 2: not a readable"), ("cut.png", "row 2: not a readable"), (None, "row 2: there is no")],
)
def test_an_image_that_cannot_be_read_is_named_before_training(broken, said, tmp_path, capsys):
    Image.new("RGB", (8, 8)).save(tmp_path / "good.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "good.png").read_bytes()[:12])
    rows = [{"image": "good.png", "label": 0}, {"image": broken, "label": 1}, {"image": "good.png", "label": 1}]
    for name, found in (("train", rows[::2] * 2), ("validation", rows)):
        (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, found)))
    files = {"train": str(tmp_path / "train.jsonl"), "validation": str(tmp_path / "validation.jsonl"), "test": None}
    with pytest.raises(SystemExit, match="2"):
        run(files, tmp_path / "run")
    assert f"validation split, {said}" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("dtype", "values", "expected"),
    [(np.uint16, [0, 1000, 30000, 65535], [0, 3, 116, 255]), (np.int32, [0, 255], [0, 255])],
)
def test_gray_images_of_16_bits_are_scaled_and_those_of_32_may_contain_8(dtype, values, expected, tmp_path):
    Image.fromarray(np.asarray([values], dtype=dtype)).save(tmp_path / "deep.tiff")
    image = open_image({"bytes": (tmp_path / "deep.tiff").read_bytes(), "path": None}, "here")
    assert np.asarray(image)[0, :, 0].tolist() == expected
