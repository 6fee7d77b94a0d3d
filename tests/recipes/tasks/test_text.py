"""Texts with classes: from files to batches and a model."""

import json
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from transformers import AutoConfig, AutoModelForSequenceClassification

from common.options import OptionError
from tasks.data import DataError
from tasks.models import check_positions
from tasks.options import ClassificationOptions
from tasks.text import ClassificationTask, prepare_text
from tests.recipes.tiny_configs import TINY_CLASSIFIER, TINY_DECODER, TINY_TRANSFORMER_XL


@pytest.fixture
def prepare(texts, tmp_path):
    def prepared(**changes):
        files = {f"{split}_file": str(texts[split]) for split in ("train", "validation")}
        sizes = {"model_config": TINY_CLASSIFIER, "min_frequency": 1, "max_length": 32}
        options = ClassificationOptions(**{**files, **sizes, **changes})
        run = SimpleNamespace(options=options, accelerator=Accelerator(cpu=True), division={"seed": 1})
        run.is_main, run.resuming, run.output_dir = True, False, tmp_path
        return prepare_text(run)

    return prepared


def test_batches_are_padded_and_hold_their_labels(prepare):
    task = prepare()
    rows = [task.splits["train"][index] for index in (0, 1)]
    labels, lengths = [row["labels"] for row in rows], [len(row["input_ids"]) for row in rows]
    batch = task.collate(rows)
    assert batch["labels"].tolist() == labels
    assert batch["attention_mask"].sum(1).tolist() == lengths == task.lengths["train"][:2]
    assert task.build_model().config.vocab_size == len(task.processor)


def test_the_class_of_a_text_does_not_depend_on_its_batch_where_the_model_knows_another_padding(prepare, tmp_path):
    tokenizer = prepare().processor
    tokenizer.save_pretrained(tmp_path / "saved")
    config = AutoConfig.for_model(**{**TINY_DECODER, "n_positions": 32, "pad_token_id": 9}, vocab_size=len(tokenizer))
    AutoModelForSequenceClassification.from_config(config).save_pretrained(tmp_path / "saved")
    task = prepare(model_name_or_path=str(tmp_path / "saved"), model_config={})
    model, lengths, rows = task.build_model().eval(), task.lengths["train"], task.splits["train"]
    short, long = (rows[pick(range(len(lengths)), key=lengths.__getitem__)] for pick in (min, max))
    alone, padded = task.collate([dict(short)]), task.collate([dict(short), long])
    torch.testing.assert_close(model(**padded).logits[0], model(**alone).logits[0])


def test_positions_that_begin_after_padding_are_counted(prepare):
    model = {**TINY_CLASSIFIER, "model_type": "roberta-prelayernorm"}
    with pytest.raises(OptionError, match="--max_length 32 is beyond the model's 31 positions"):
        prepare(model_config=model).build_model()


def test_a_model_of_any_length_is_taken():
    model = AutoModelForSequenceClassification.from_config(AutoConfig.for_model(**TINY_TRANSFORMER_XL, vocab_size=20))
    check_positions(model, 128, "max_length")


@pytest.fixture
def saved(prepare, tmp_path):
    """A model of two classes, `0` and `1`."""
    task = prepare()
    for part in (task.build_model(), task.processor):
        part.save_pretrained(tmp_path / "saved")
    return {"model_config": {}, "model_name_or_path": str(tmp_path / "saved")}


@pytest.mark.parametrize(
    ("names", "said"),
    [
        (["0", "1", "2"], r"saved: its classifier.bias has the shape \(2,\), not \(3,\): it was trained for other"),
        (["1", "0"], "saved: its classes are, in order, 0, 1; those of the data are 1, 0: .* --label_names"),
    ],
)
def test_a_model_of_other_classes_is_refused(names, said, saved, prepare):
    with pytest.raises(OptionError, match=said):
        prepare(label_names=names, **saved).build_model()
    assert prepare(label_names=["no", "yes"], **saved).build_model().config.id2label == {0: "no", 1: "yes"}


@pytest.mark.parametrize(
    ("changes", "error", "said"),
    [
        ({"text_column": "txt"}, DataError, "--text_column 'txt': the train split has no such column"),
        ({"text_pair_column": "txt"}, DataError, "--text_pair_column 'txt': the train split has no such column"),
        ({"label_names": ["only"]}, DataError, "a single class"),
        ({"model_config": {}}, OptionError, "give either --model_name_or_path or model_config"),
    ],
)
def test_what_would_stop_the_training_is_refused(changes, error, said, prepare):
    with pytest.raises(error, match=said):
        prepare(**changes)


def test_what_a_score_is_made_of_adds_up_to_it(tmp_path):
    (tmp_path / "test_predictions.json").write_text(json.dumps({"predictions": [0, 1, 1], "labels": [0, 1, 0]}))
    statistics = ClassificationTask.outcomes(tmp_path, {})
    assert ClassificationTask.score_of(statistics.sum(0, keepdims=True)).tolist() == [pytest.approx(200 / 3)]
