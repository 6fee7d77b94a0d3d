"""Apply a saved classifier or parser to a file, through the stock API, without the training code.

    python recipes/predict.py --model outputs/run/best --data reviews.csv --output predictions.json
    python recipes/predict.py --model ... --data pairs.jsonl --columns premise hypothesis --output ...
    python recipes/predict.py --task image --columns image --model outputs/mnist/best --data ... --output ...
    python recipes/predict.py --task parsing --model outputs/parser/best --data raw.conllu --output parsed.conllu

The output is a JSON list with the class and its probability for each row, in the order of the file:
`[{"label": "positive", "score": 0.93}, ...]`. For parsing, it is the CoNLL-U file with heads and relations. The
recipes run this script in a fresh process to test their models.
"""

from __future__ import annotations

import argparse

from common.endings import clear_use
from common.options import saved_model_parser


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = saved_model_parser(__doc__)
    parser.add_argument("--data", required=True, help=".csv, .tsv, .jsonl or .parquet; for parsing, CoNLL-U")
    parser.add_argument("--task", choices=["text", "image", "parsing"], default="text")
    parser.add_argument("--columns", nargs="+", default=["text"], help="text column, or the two of a pair")
    parser.add_argument("--output", required=True, help="file to write")
    return parser.parse_args()


if __name__ == "__main__":  # help, and mistakes in the options, before torch is imported
    parse_arguments()

import json
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import (
    AutoImageProcessor,
    AutoModelForImageClassification,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedModel,
)

from common.progress import with_time_left
from common.saved import device_and_autocast, load_saved
from tasks import image_cnn, transition_parser  # noqa: F401  (registers them with the Auto classes)
from tasks.arc_standard import ParserVocabulary, parse_sentences
from tasks.conllu import check_forms, check_tags, read_conllu, write_conllu
from tasks.data import check_column, check_text_column, load_file
from tasks.images import as_images, open_image

Prediction = dict[str, Any]  # "label" and "score"


def _predictions(model: PreTrainedModel, inputs: Any) -> list[Prediction]:
    scores, classes = model(**inputs).logits.float().softmax(-1).max(-1)  # (batch,)
    names = model.config.id2label
    return [{"label": names[n], "score": s} for n, s in zip(classes.tolist(), scores.tolist(), strict=True)]


@torch.inference_mode()
def predict_texts(
    model_dir: str, rows: list[tuple[str, ...]], batch_size: int, precision: str, trust: bool = False
) -> list[Prediction]:
    """Return the class of every text, or pair of texts, in batches of similar length."""
    device, autocast = device_and_autocast(precision)
    model = load_saved(AutoModelForSequenceClassification, model_dir, trust_remote_code=trust).to(device)
    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    order = sorted(range(len(rows)), key=lambda index: -sum(map(len, rows[index])))
    predictions: list[Prediction] = [{}] * len(rows)
    for start in with_time_left(range(0, len(order), batch_size), "prediction"):
        indices = order[start : start + batch_size]
        columns = [list(column) for column in zip(*(rows[index] for index in indices), strict=True)]
        inputs = tokenizer(*columns, truncation=True, padding=True, return_tensors="pt").to(device)
        with autocast:
            found = _predictions(model, inputs)
        for index, prediction in zip(indices, found, strict=True):
            predictions[index] = prediction
    return predictions


@torch.inference_mode()
def predict_images(
    model_dir: str, images: Dataset, batch_size: int, precision: str, trust: bool = False
) -> list[Prediction]:
    """Return the class of every image of a data set with a single column of encoded images."""
    device, autocast = device_and_autocast(precision)
    model = load_saved(AutoModelForImageClassification, model_dir, trust_remote_code=trust).to(device)
    processor = AutoImageProcessor.from_pretrained(model_dir)
    [column] = images.column_names
    predictions: list[Prediction] = []
    for start in with_time_left(range(0, len(images), batch_size), "prediction"):
        values = images[start : start + batch_size][column]
        batch = [open_image(value, f"row {row}") for row, value in enumerate(values, start=start + 1)]
        inputs = processor(images=batch, return_tensors="pt").to(device)
        with autocast:
            predictions += _predictions(model, inputs)
    return predictions


@torch.inference_mode()
def parse_file(model_dir: str, file: str, batch_size: int, precision: str, trust: bool = False) -> str:
    """Return the sentences of a CoNLL-U or CoNLL-X file with the heads and relations that the model predicts."""
    device, autocast = device_and_autocast(precision)
    model = load_saved(AutoModelForSequenceClassification, model_dir, trust_remote_code=trust).to(device)
    vocabulary = ParserVocabulary.from_pretrained(model_dir)
    sentences = read_conllu(file, tag_column=model.config.tag_column, trees=False)
    check_forms(sentences, file)
    if "_" not in vocabulary.tags:
        check_tags(sentences, file, model.config.tag_column)
    encoded = [vocabulary.encode(sentence) for sentence in sentences]
    with autocast:
        heads, relations = parse_sentences(model, encoded, single_root=model.config.single_root, batch_size=batch_size)
    return write_conllu(sentences, heads, map(vocabulary.names, relations))


def predict(arguments: argparse.Namespace) -> tuple[str, str]:
    """Return the text of the output, and what it is. Raises DataError for data that does not fit."""
    settings = (arguments.batch_size, arguments.mixed_precision, arguments.trust_remote_code)
    if arguments.task == "parsing":
        return parse_file(arguments.model, arguments.data, *settings), "parsed sentences"
    text_columns = arguments.columns if arguments.task == "text" else []
    data = load_file(arguments.data, text_columns=text_columns, option_name="data")
    for column in arguments.columns:
        if arguments.task == "image":
            check_column(data, "given", column, "columns")
        else:
            check_text_column({"given": data}, column, "columns", {"given": arguments.data})
    if arguments.task == "image":
        images = as_images(data.select_columns(arguments.columns), arguments.columns[0], arguments.data)
        predictions = predict_images(arguments.model, images, *settings)
    else:
        rows = list(zip(*(data[column][:] for column in arguments.columns), strict=True))
        predictions = predict_texts(arguments.model, rows, *settings)
    lines = ",\n".join(json.dumps(prediction, ensure_ascii=False) for prediction in predictions)
    return f"[\n{lines}\n]\n", f"{len(predictions):,} predictions"


def main() -> None:
    arguments = parse_arguments()
    with clear_use(arguments):
        text, what = predict(arguments)
        Path(arguments.output).write_text(text, encoding="utf-8")
    if not arguments.quiet:
        print(f"wrote {what} to {arguments.output}")


if __name__ == "__main__":
    main()
