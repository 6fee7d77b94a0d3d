"""The language modeling recipe: bytes, windows, bits per character, runs of a tiny decoder."""

import json
import math
import random

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, pipeline

import language_modeling
from score_bytes import collate_windows, window_bits
from tasks.bytes import ByteDataOptions, Windows, load_byte_splits
from tests.recipes.fault_runs import assert_refused, flags, norms_of, stopped_and_resumed
from tests.recipes.recipe_process import read_results
from tests.recipes.tiny_configs import TINY_DECODER, TINY_TRANSFORMER_XL


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    """Words in an order that is easy to learn, 6,000 bytes."""
    draw = random.Random(0)
    words = ["norm", "layer", "größe", "ada", "mean"]
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_bytes(" ".join(draw.choice(words) for _ in range(1500)).encode()[:6000])
    return path


def arguments_for(text, folder, **changes):
    options = {
        "train_file": text,
        "validation_characters": 500,
        "test_characters": 700,
        "sequence_length": 16,
        "eval_stride": 8,
        "model_config": json.dumps(TINY_DECODER),
        "batch_size": 8,
        "max_steps": 40,
        "eval_steps": 20,
        "learning_rate": 0.01,
        "output_dir": folder,
        "score_test": "false",
        **changes,
    }
    return flags(options)


def run(text, folder, **changes):
    language_modeling.main(arguments_for(text, folder, **changes))
    return read_results(folder)


@pytest.fixture(scope="module")
def trained(text, tmp_path_factory):
    folder = tmp_path_factory.mktemp("trained")
    return folder, run(text, folder, k=0.07, score_test="true")


def test_validation_and_test_are_the_end_of_the_file(text):
    data = np.frombuffer(text.read_bytes(), dtype=np.uint8)
    sizes = {"validation_characters": 500, "test_characters": 700, "max_train_characters": 1000}
    splits = load_byte_splits(ByteDataOptions(train_file=str(text), sequence_length=16, **sizes))
    assert (splits["test"] == data[-700:]).all()
    assert (splits["validation"] == data[-1200:-700]).all()
    assert (splits["train"] == data[:1000]).all()


def test_the_model_learns_and_scores_the_same_in_a_fresh_process(trained, text, tmp_path):
    folder, results = trained
    assert results["norm_modules"] == 3
    assert results["validation"]["bits_per_character"] < 4  # of 8, about the entropy of single bytes
    for scores in results["history"]:
        assert scores["loss"] == pytest.approx(scores["bits_per_character"] * math.log(2))
    assert results["test"]["bits_per_character"] == pytest.approx(results["validation"]["bits_per_character"], abs=0.5)
    bits = json.loads((folder / "test_bits.json").read_text())
    assert sum(bits["characters"]) == 699
    model = AutoModelForCausalLM.from_pretrained(folder / "best").eval()
    windows = Windows(np.frombuffer(text.read_bytes(), dtype=np.uint8)[-700:], 16, 8)
    with torch.no_grad():
        here = window_bits(model, collate_windows([windows[index] for index in range(len(windows))]))
    assert here.sum().item() / 699 == pytest.approx(results["test"]["bits_per_character"], abs=1e-5)


def test_the_best_model_generates_in_a_stock_pipeline(trained):
    folder, _ = trained
    generate = pipeline("text-generation", str(folder / "best"))
    answer = generate("layer no", max_new_tokens=4, do_sample=False)[0]["generated_text"]
    assert answer.startswith("layer no")
    assert len(answer.encode()) >= len("layer no") + 1
    assert [settings["k"] for _, settings in norms_of(generate.model)] == [0.07] * 3


def test_a_run_with_memory_stopped_in_the_middle_of_its_streams_ends_with_the_same_scores(text, tmp_path):
    changes = {"model_config": json.dumps({**TINY_TRANSFORMER_XL, "dropout": 0.1}), "batch_size": 4}
    changes |= {"gradient_accumulation_steps": 2, "eval_stride": 256}  # a memory ignores the stride
    whole = run(text, tmp_path / "whole", score_test="true", **changes)  # 40 steps, of which 37 are an epoch
    assert whole["norm_modules"] == 2
    assert whole["validation"]["bits_per_character"] < 4
    bits = json.loads((tmp_path / "whole" / "test_bits.json").read_text())
    assert sum(bits["characters"]) == 699
    stopped = tmp_path / "resumed"
    resumed = stopped_and_resumed(lambda: run(text, stopped, checkpointing_steps=5, **changes), stopped)
    assert resumed["history"] == whole["history"]


def test_a_folded_layernorm_simple_scores_as_the_pretrained_model(text, tmp_path):
    before = run(text, tmp_path / "layernorm", norm="layernorm")
    start = {"model_config": "{}", "model_name_or_path": tmp_path / "layernorm" / "best", "affine": "fold"}
    start |= {"tied": "untie", "learning_rate": 1e-9, "max_steps": 1}
    after = run(text, tmp_path / "run", norm="layernorm-simple", **start)
    assert after["norm_modules"] == before["norm_modules"] == 3
    assert after["history"][0]["loss"] == pytest.approx(before["validation"]["loss"], abs=0.01)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"train_file": "absent.txt"}, "--train_file absent.txt: no such file"),
        ({"test_characters": 6000}, "has only 6,000 bytes to divide; give fewer"),
        ({"validation_characters": "null"}, "no validation data"),
        ({"validation_characters": 10}, "the validation split has 10 bytes: too few"),
        ({"eval_stride": 17}, "--eval_stride must be between 1 and --sequence_length 16"),
        ({"model_config": json.dumps({**TINY_DECODER, "vocab_size": 300})}, "the model has 300 tokens"),
    ],
)
def test_bad_input_ends_in_one_line(changes, said, text, tmp_path, capsys):
    assert_refused(language_modeling.main, arguments_for(text, tmp_path, **changes), said, capsys)
